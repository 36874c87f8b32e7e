"""What is seen of a running scene."""

from __future__ import annotations

import os
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from psi_kv_governor.bench import messages, watch
from psi_kv_governor.bench.outcome import Ending, result_of
from psi_kv_governor.bench.sampling import glance, sample
from psi_kv_governor.bench.script import Shares, Tick
from psi_kv_governor.bench.watch import Span, Watch, amount_at, shares
from psi_kv_governor.events import Released, Trimmed
from psi_kv_governor.pressure.psi import PsiTotals


class FakeStalls:
    """Counters that a test sets."""

    def __init__(self, inside: PsiTotals | None = None, outside: PsiTotals | None = None) -> None:
        self.of_pen, self.of_machine = inside, outside

    def inside(self) -> PsiTotals | None:
        return self.of_pen

    def outside(self) -> PsiTotals | None:
        return self.of_machine


def watched(variant="psi", stalls=None):
    events = []
    return Watch(variant, stalls or FakeStalls(), os.getpid(), events.append), events


class TestAmounts:
    POINTS = [(1.0, 0), (2.0, 100), (4.0, 500)]  # noqa: RUF012

    @pytest.mark.parametrize(
        ("time_s", "amount"), [(0.0, 0), (1.0, 0), (1.5, 50), (2.0, 100), (3.0, 300), (4.0, 500), (9.0, 500)]
    )
    def test_between_two_reports_it_is_in_proportion(self, time_s, amount):
        assert amount_at(self.POINTS, time_s) == amount

    def test_two_reports_of_one_moment_are_no_harm(self):
        assert amount_at([(1.0, 0), (1.0, 7), (2.0, 9)], 1.0) == 7

    @given(
        st.lists(st.tuples(st.floats(0, 100), st.integers(0, 1000)), min_size=1),
        st.floats(0, 100),
        st.floats(0, 100),
    )
    def test_it_never_falls(self, steps, one, other):
        time_s, done, points = 0.0, 0, []
        for more_s, more in steps:
            time_s, done = time_s + more_s, done + more
            points.append((time_s, done))
        early, late = sorted((one, other))
        assert 0 <= amount_at(points, early) <= amount_at(points, late) + 1e-6 <= done + 1e-5


class TestShares:
    def test_they_are_of_the_time_between(self):
        assert shares(PsiTotals(0, 0), PsiTotals(500_000, 250_000), 2.0) == Shares(0.25, 0.125)

    def test_they_stay_between_nothing_and_all(self):
        assert shares(PsiTotals(9, 9), PsiTotals(0, 10**9), 1.0) == Shares(0.0, 1.0)

    def test_nobody_knows_where_no_kernel_tells(self):
        assert shares(None, PsiTotals(1, 1), 1.0) is None
        assert shares(PsiTotals(1, 1), PsiTotals(1, 1), 0.0) is None


def test_a_glance_sees_what_a_look_sees_to_some_pages():
    held = bytearray(os.urandom(1 << 20) * 24)
    quick, exact = glance(os.getpid()), sample(os.getpid())
    assert abs(quick.resident_bytes - exact.resident_bytes) < 8 << 20
    assert abs(quick.anonymous_bytes - exact.anonymous_bytes) < 8 << 20
    assert quick.peak_bytes >= quick.resident_bytes
    assert held


def test_a_glance_at_a_process_that_is_gone_is_none(tmp_path):
    assert glance(1, root=tmp_path) is None


def test_cells_and_bytes_follow_what_the_model_says():
    seen, _ = watched()
    seen.hear(messages.Ready(calm_tokens_per_s=9.0, live_cells=1000))
    seen.hear(messages.Progress(stage="pressed", done=0, total=2))
    seen.hear(messages.Token(seconds=0.1))
    assert (seen.live_cells, seen.token_s) == (1001, [0.1])
    trimmed = Trimmed(time_s=5.0, cells=400, spilled=400, bytes_returned=70, seconds=0.1, reason="why")
    seen.hear(messages.Governed(event=trimmed, live_cells=601))
    seen.hear(messages.Governed(event=Released(time_s=6.0, bytes_returned=7), live_cells=601))
    assert (seen.live_cells, seen.trim_s, seen.returned_bytes) == (601, [5.0], 77)
    seen.hear(messages.Pruned(cells=1, live_cells=600, bytes_returned=0))
    assert (seen.live_cells, len(seen.trim_s), seen.returned_bytes) == (600, 2, 77)


def test_moments_are_taken_ten_times_a_second_once_the_context_is_full(monkeypatch):
    seen, events = watched(stalls=FakeStalls(PsiTotals(0, 0), PsiTotals(0, 0)))
    clock = [time.monotonic()]
    monkeypatch.setattr(watch.time, "monotonic", lambda: clock[0])

    def run(seconds: float) -> None:
        for _ in range(round(seconds / 0.02)):
            clock[0] += 0.02
            seen.tick()

    run(1.0)
    assert seen.moments == []
    seen.hear(messages.Progress(stage="pressed", done=0, total=9))
    seen.hear(messages.Token(seconds=0.3))
    seen.hear(messages.Token(seconds=0.1))
    run(1.0)
    assert 9 <= len(seen.moments) <= 11
    assert [moment.token_s for moment in seen.moments[:2]] == [0.3, None]
    assert seen.moments[-1].resident_bytes > 0
    assert 3 <= sum(isinstance(event, Tick) for event in events) <= 5


def test_the_figures_of_a_scene_are_of_its_pressed_time():
    stalls = FakeStalls(PsiTotals(0, 0), PsiTotals(0, 0))
    seen, _ = watched("fixed", stalls)
    span = Span(stalls)
    for more_s, done in ((-1.0, 0), (0.0, 1000), (1.0, 3000)):
        seen.hear_neighbour(
            messages.NeighbourSaid(event="work", time_s=span.begin_s + more_s, taken_bytes=9, work_bytes=done)
        )
    stalls.of_pen, stalls.of_machine = PsiTotals(10**9, 0), None
    time.sleep(0.02)
    span.end()
    settled = messages.Settled(missing_cells=0, seconds=0.0, by_hand=False)
    ending = Ending(variant="fixed", seconds=0.5, final_cells=77, settled=settled)
    seen.token_s.extend([0.1, 0.2])
    found = result_of(ending, span, seen)
    assert found.tokens_per_s == 4.0
    assert (found.p50_s, found.p99_s, found.max_s) == (0.1, 0.2, 0.2)
    assert found.neighbour_bytes_per_s == pytest.approx(2000.0)
    assert (found.stall, found.stall_full, found.outside) == (1.0, 0.0, None)
    assert found.decoding_from_s == pytest.approx(1.0)
    assert found.neighbour_work[0] == (0.0, 0)
    assert (found.final_cells, found.killed, found.restored) == (77, False, None)


def test_a_scene_that_was_killed_before_its_first_token_has_no_latency():
    stalls = FakeStalls()
    seen, _ = watched("fixed", stalls)
    span = Span(stalls)
    time.sleep(0.01)
    span.end()
    found = result_of(Ending(variant="fixed"), span, seen)
    assert (found.killed, found.tokens, found.p99_s, found.max_s) == (True, 0, None, None)
    assert found.seconds == pytest.approx(span.seconds)
    assert found.neighbour_bytes_per_s is None
