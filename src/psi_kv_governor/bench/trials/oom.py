"""Many short runs without swap: at which ramp the kernel begins to kill, with a fixed cache and governed."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence

import msgspec

from psi_kv_governor.bench.messages import Variant
from psi_kv_governor.bench.record import Say
from psi_kv_governor.bench.sampling import sample
from psi_kv_governor.bench.trials import messages
from psi_kv_governor.bench.trials.host import MB, Host, ModelKilledError, Setup
from psi_kv_governor.bench.trials.oom_plan import OomOptions, Trial
from psi_kv_governor.bench.trials.sizing import Need, Sizes
from psi_kv_governor.bench.trials.start import Serving, Starter
from psi_kv_governor.bench.trials.watch import Look, Watch
from psi_kv_governor.config import GovernorConfig
from psi_kv_governor.control.state import BUDGET_WINDOW_S
from psi_kv_governor.events import Released, Trimmed

CALM_S = 0.5
"""Decoded in peace before the neighbour comes."""
_LOOK_S = 0.01
_HEAR_S = 0.02
_STUCK_S = 30.0
"""Past the time that the ramp and the hold take. A pen at its limit can thrash for minutes without a kill."""
_TRAIL = 40


class Runner(Serving):
    """Runs trials one after the other; a model that came back whole serves the next one of its variant.

    `setup` and `need` come from `sizing.prepared`.
    """

    def __init__(
        self,
        setup: Setup,
        need: Need,
        sizes: Sizes,
        options: OomOptions,
        *,
        config: GovernorConfig,
        say: Say,
    ) -> None:
        super().__init__(Starter(setup, need, sizes, "none", 0), say)
        self._need, self._sizes, self._options, self._config = need, sizes, options, config

    def run(self, number: int, variant: Variant, rate: float) -> Trial:
        """One trial. Raises PsiKvError where the model can't be run at all."""
        host, fresh = self._ready(variant, self._has_budget)
        outcome = _Watched(host, self._sizes, self._options, rate).play()
        began_s = time.monotonic()
        killed = outcome.model_killed
        back = not killed and not outcome.stuck and not self._starter.make_whole(host)
        if not back:
            killed = self._give_up(host) or killed  # also while its context came back
        return msgspec.structs.replace(
            outcome,
            number=number,
            variant=variant,
            fresh=fresh,
            model_killed=killed,
            whole=None if killed else back,
            whole_s=time.monotonic() - began_s if back else None,
        )

    def _has_budget(self, host: Host) -> bool:
        """Whether a whole context may still be given up in this minute.

        A process that has used up the minute's budget of cells would stand the next trial without a
        governor: that is the guard against a hostile neighbour, and not what is measured here.
        """
        now_s = time.monotonic()
        spent = sum(cells for time_s, cells in host.given_up if now_s - time_s <= BUDGET_WINDOW_S)
        return spent <= (self._config.budget_per_min - 1.0) * self._need.context_tokens


class _Watched:
    """One trial from the calm before it to the end of the hold."""

    def __init__(self, host: Host, sizes: Sizes, options: OomOptions, rate: float) -> None:
        self._host, self._sizes, self._options, self._rate = host, sizes, options, rate
        self._tokens: list[messages.Token] = []
        self._events: list[messages.Governed] = []
        self._trail: deque[messages.Turned] = deque(maxlen=_TRAIL)
        self._peak_bytes = 0

    def play(self) -> Trial:
        host = self._host
        host.forget_peak()
        host.say("decode")
        self._listen_for(CALM_S)
        killed = stuck = False
        with Watch(host.pen.group, host.pid, _LOOK_S) as watch:
            host.bring_neighbour(self._sizes.load_bytes, self._rate * MB)
            try:
                stuck = not self._press()
            except ModelKilledError:
                killed = True
            ended_s = time.monotonic()
        neighbour_killed = host.neighbour_killed()
        host.end_neighbour()
        began = host.said_at("begin")
        return self._outcome(
            watch.looks,
            began.time_s if began else ended_s,
            ended_s,
            killed=killed,
            neighbour_killed=neighbour_killed,
            stuck=stuck,
        )

    def _press(self) -> bool:
        """Until the hold is over or the neighbour is killed; False where neither comes."""
        ramp_s = self._sizes.load_bytes / (self._rate * MB) if self._rate else 0.0
        deadline_s = time.monotonic() + ramp_s + self._options.hold_s + _STUCK_S
        while time.monotonic() < deadline_s:
            self._hear(_HEAR_S)
            taken = self._host.said_at("taken")
            if self._host.neighbour_killed():
                self._listen_for(_HEAR_S)  # the model may have been killed with it
                return True
            if taken is not None and time.monotonic() - taken.time_s >= self._options.hold_s:
                return True
        return False

    def _listen_for(self, seconds: float) -> None:
        until_s = time.monotonic() + seconds
        while (left_s := until_s - time.monotonic()) > 0:
            self._hear(min(left_s, _HEAR_S))

    def _hear(self, timeout_s: float) -> None:
        for message in self._host.hear(timeout_s):
            if isinstance(message, messages.Token):
                self._tokens.append(message)
            elif isinstance(message, messages.Governed):
                self._events.append(message)
            elif isinstance(message, messages.Turned):
                self._trail.append(message)
        look = sample(self._host.pid) if not self._peak_bytes else None
        if look is not None:
            self._peak_bytes = look.peak_bytes
        self._host.check_alive()

    def _outcome(
        self,
        looks: Sequence[Look],
        began_s: float,
        ended_s: float,
        *,
        killed: bool,
        neighbour_killed: bool,
        stuck: bool,
    ) -> Trial:
        pressed = [look for look in looks if look.time_s >= began_s]
        back = [
            told.event
            for told in self._events
            if isinstance(told.event, (Trimmed, Released)) and told.event.time_s >= began_s
        ]
        first = next((event.time_s for event in back if event.bytes_returned), None)
        final = sample(self._host.pid)
        return Trial(
            number=0,
            variant="fixed",
            rate=self._rate,
            sizes=self._sizes,
            fresh=False,
            model_killed=killed,
            neighbour_killed=neighbour_killed,
            stuck=stuck,
            seconds=ended_s - began_s,
            taken_bytes=max((line.taken_bytes for line in self._host.said), default=0),
            token_s=self._token_s(began_s, ended_s, killed),
            peak_bytes=max([self._peak_bytes, *([final.peak_bytes] if final else [])]),
            held_bytes=None if killed or final is None else final.resident_bytes,
            returned_bytes=sum(event.bytes_returned for event in back),
            trims=sum(isinstance(event, Trimmed) for event in back),
            first_returned_s=None if first is None else first - began_s,
            least_headroom_bytes=min((look.headroom_bytes for look in pressed), default=0),
            stall_s=(pressed[-1].some_us - pressed[0].some_us) / 1e6 if pressed else 0.0,
            whole=None,
            whole_s=None,
            trail=list(self._trail) if killed or neighbour_killed else [],
        )

    def _token_s(self, began_s: float, ended_s: float, killed: bool) -> list[float]:
        """Of tokens since the neighbour's first byte. One that never came took at least until the end."""
        done = [token for token in self._tokens if token.time_s >= began_s]
        last_s = self._tokens[-1].time_s if self._tokens else began_s
        waits = [] if killed else [ended_s - last_s]
        longest = max((token.seconds for token in done), default=0.0)
        return [token.seconds for token in done] + [wait for wait in waits if wait > longest]
