"""Settings, traces and caches of any kind, for laws over all of them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from hypothesis import settings
from hypothesis import strategies as st

from psi_kv_governor.config import GovernorConfig
from psi_kv_governor.control import (
    Action,
    CacheSnapshot,
    Decision,
    LawState,
    decide,
)
from psi_kv_governor.pressure.reading import Reading, one_level

LIMIT_BYTES = 1 << 30
PROTECTED = 320
SHORT = settings(max_examples=80)

shares = st.one_of(st.floats(0.0, 1.0), st.sampled_from([0.0, 0.01, 0.02, 0.05, 0.1, 0.3, 1.0]))
headrooms = st.none() | shares.map(lambda share: int(share * LIMIT_BYTES))


@st.composite
def configs(draw) -> GovernorConfig:
    low, high = sorted((draw(st.floats(0.01, 0.9)), draw(st.floats(0.01, 0.9))))
    least, most = sorted((draw(st.floats(0.0, 1.0)), draw(st.floats(0.0, 1.0))))
    return GovernorConfig(
        low=low,
        high=high,
        step_min=least,
        step_max=most,
        headroom_low=draw(st.floats(0.0, 0.1)),
        headroom_plenty=draw(st.floats(0.1, 1.0)),
        cooldown_s=draw(st.floats(0.3, 3.0)),
        cooldown_acute_s=draw(st.floats(0.0, 0.3)),
        acute_full=draw(st.floats(0.05, 1.0)),
        step_acute=draw(st.floats(0.0, 1.0)),
        lead_s=draw(st.floats(0.0, 1.0)),
        high_max=draw(st.floats(0.0, 1.0)),
        futile_trims=draw(st.integers(1, 5)),
        quiet_s=draw(st.floats(0.01, 10.0)),
        budget_per_min=draw(st.floats(0.0, 3.0)),
        restore_share=draw(st.floats(0.0, 1.0)),
    )


@st.composite
def traces(draw) -> list[Reading]:
    """Readings in order, with a few that make no sense and long runs of the same."""
    time_s, looks = 0.0, []
    for _ in range(draw(st.integers(1, 12))):
        some = draw(st.sampled_from([math.nan, -1.0]) | shares | shares | shares | shares)
        headroom = draw(headrooms)
        gap_s = draw(st.sampled_from([0.0, 0.02, 0.1, 0.5, 2.0]))
        full_share = draw(st.sampled_from([0.0, 0.5, 1.0]))
        for _ in range(draw(st.integers(1, 15))):
            time_s += gap_s
            looks.append(
                one_level(
                    time_s=time_s,
                    interval_s=gap_s,
                    some=some,
                    full=some * full_share if some >= 0.0 else some,
                    headroom_bytes=headroom,
                    limit_bytes=LIMIT_BYTES,
                )
            )
    return looks


STEP_CELLS = 64


@dataclass
class Cache:
    """Gives up what it is told to, loses every third trim, restores in slices, and decodes between readings.

    A part of it costs no fidelity: it is parked and read back by itself, so that it stays live.
    """

    live: int
    cell_bytes: int
    idle: int = 0
    masked: int = 0
    lost: int = 0
    trims: int = field(default=0, init=False)

    def snapshot(self) -> CacheSnapshot:
        idle = min(self.idle, self.live)
        lossy = max(0, self.live - idle - PROTECTED)
        return CacheSnapshot(
            live_bytes=self.live * self.cell_bytes,
            masked_bytes=self.masked * self.cell_bytes,
            lost_bytes=self.lost * self.cell_bytes,
            trimmable_bytes=(lossy + idle) * self.cell_bytes,
            lossless_bytes=idle * self.cell_bytes,
            step_bytes=STEP_CELLS * self.cell_bytes,
        )

    def apply(self, decision: Decision) -> None:
        cells = -(-decision.n_bytes // self.cell_bytes)
        if decision.action is Action.TRIM:
            self.trims += 1
            lossless = min(cells, self.idle, self.live)
            self.idle -= lossless
            self.live -= cells - lossless
            if self.trims % 3 == 0:
                self.lost += cells - lossless
            else:
                self.masked += cells - lossless
        elif decision.action is Action.RESTORE:
            came = min(cells, 2 * STEP_CELLS)
            self.live += came
            self.masked -= came
        self.live += 1


caches = st.builds(
    Cache,
    live=st.integers(0, 8000),
    cell_bytes=st.sampled_from([1, 23_040, 1 << 20]),
    idle=st.sampled_from([0, 0, 100, 4000]),
)

Step = tuple[Reading, CacheSnapshot, Decision]


def play(config: GovernorConfig, looks: list[Reading], cache: Cache) -> list[Step]:
    state, steps = LawState(), []
    for look in looks:
        before = cache.snapshot()
        decision, state = decide(config, state, look, before)
        assert decision.mode is state.mode
        steps.append((look, before, decision))
        cache.apply(decision)
    return steps


def of(steps: list[Step], action: Action) -> list[Step]:
    return [step for step in steps if step[2].action is action]
