"""What the governor did itself is not held against the machine. The span arithmetic is in test_own_work."""

from __future__ import annotations

from governor_help import of_kind, plans_of, state

from psi_kv_governor.config import GovernorConfig
from psi_kv_governor.events import Trimmed
from psi_kv_governor.pressure.reading import Reading, one_level

MB = 1_000_000


def test_memory_that_is_about_to_be_gone_makes_a_plan_urgent(open_governor, source, engine, monkeypatch):
    plans = plans_of(engine, monkeypatch)
    for headroom_mb in (10, 35):
        source.limit_bytes, source.headroom_bytes = 1000 * MB, headroom_mb * MB
        open_governor().step()
    assert [plan.urgent for plan in plans] == [True, False]


def test_stall_of_its_own_restoring_does_not_make_it_trim_again(open_governor, engine, monkeypatch, events):
    """The machine stalls exactly while the governor restores: the answer to that is not another trim."""
    apply, now_s = engine.apply, [100.0]

    def slowly(plan):
        now_s[0] += 0.05
        return apply(plan)

    monkeypatch.setattr(engine, "apply", slowly)

    class Busy:
        """Stall is the governor's own work of the last interval."""

        name = "a machine that stalls when it is worked"

        def __init__(self) -> None:
            self.last_s = now_s[0]
            self.readings: list[Reading] = []

        def read(self) -> Reading:
            span = {"time_s": now_s[0], "interval_s": now_s[0] - self.last_s}
            lost = governor.work.taken_off(one_level(**span)).own
            self.last_s = now_s[0]
            self.readings.append(one_level(**span, some=lost, full=lost))
            return self.readings[-1]

        def close(self) -> None: ...

    busy = Busy()
    governor = open_governor(source=busy, config=GovernorConfig(quiet_s=0.02), clock=lambda: now_s[0])
    governor.subscribe(events.append)
    governor.trim(0.5)
    while state(engine).masked_cells and now_s[0] < 120.0:
        governor.step()
        now_s[0] += 0.005
    assert max(look.some for look in busy.readings) > 0.5
    assert state(engine).masked_cells == 0
    assert [event.reason for event in of_kind(events, Trimmed)] == ["by hand"]
