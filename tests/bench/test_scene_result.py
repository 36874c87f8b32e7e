"""What comes of a scene, from what was seen and said: no process, and no clock."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from psi_kv_governor.events import Released, Trimmed
from psi_kv_governor.sandbox.process_memory import Sample
from psikv_bench import messages
from psikv_bench.messages import NeighbourSaid
from psikv_bench.pressure.result import Seen, moments, result_of
from psikv_bench.watch import Look, Pressure, Shares, amount_at, between, shares

MIB = 1 << 20


def look(time_s: float, some_us: int | None = 0, resident_bytes: int = 100 * MIB, **memory: int) -> Look:
    """A look at a calm scene; `some_us` None: nobody says."""
    pressure = None if some_us is None else Pressure(some_us, some_us // 2, 0.0)
    kept = {"anonymous_bytes": 0, "swap_bytes": 0, "peak_bytes": resident_bytes, **memory}
    return Look(time_s, pressure, None, 0, Sample(resident_bytes=resident_bytes, **kept))


def psi(some_us: int, full_us: int) -> Pressure:
    return Pressure(some_us, full_us, 0.0)


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
        assert shares(psi(0, 0), psi(500_000, 250_000), 2.0) == Shares(0.25, 0.125)

    def test_they_stay_between_nothing_and_all(self):
        assert shares(psi(9, 9), psi(0, 10**9), 1.0) == Shares(0.0, 1.0)

    def test_nobody_knows_where_no_kernel_tells(self):
        assert shares(None, psi(1, 1), 1.0) is None
        assert shares(psi(1, 1), psi(1, 1), 0.0) is None

    def test_between_two_times_the_counters_are_taken_in_proportion(self):
        looks = [look(0.0, 0), look(1.0, 1_000_000), look(2.0, 1_000_000)]
        assert between(looks, 0.5, 1.5, inside=True) == Shares(0.5, 0.25)
        assert between(looks, 0.0, 1.0, inside=False) is None
        assert between([], 0.0, 1.0, inside=True) is None


def progress(stage, done=0, total=9):
    return messages.Progress(stage=stage, done=done, total=total)


def test_cells_and_bytes_follow_what_the_model_says():
    seen = Seen(variant="psi")
    seen.hear(progress("prefill", done=1000), 1.0)
    seen.hear(progress("pressed"), 2.0)
    seen.hear(messages.Token(time_s=2.1, seconds=0.1), 2.1)
    assert (seen.live_cells, [token.seconds for token in seen.tokens]) == (1001, [0.1])
    trimmed = Trimmed(time_s=5.0, cells=400, masked=400, bytes_returned=70, seconds=0.1, reason="why")
    seen.hear(messages.Governed(event=trimmed, live_cells=601), 5.0)
    seen.hear(messages.Governed(event=Released(time_s=6.0, bytes_returned=7), live_cells=601), 6.0)
    assert (seen.live_cells, seen.trim_s, seen.returned_bytes) == (601, [5.0], 77)


def test_a_chunk_of_a_prompt_is_no_token():
    seen = Seen(variant="fixed")
    seen.hear(progress("pressed"), 0.0)
    seen.hear(messages.Token(time_s=1.0, seconds=1.0, tokens=512), 1.0)
    assert seen.tokens == []


def test_moments_are_taken_once_the_context_is_full_and_say_what_held_then():
    seen = Seen(variant="psi", stages=[(0.0, "load"), (10.0, "pressed")], live=[(0.0, 5), (10.25, 6)])
    seen.tokens = [messages.Token(time_s=10.2 + n * 0.01, seconds=s) for n, s in enumerate((0.3, 0.1))]
    # Ten looks a second, by whole numbers: a clock's fractions have no say in how many there are.
    looks = [look(9.5 + n / 10, n * 25_000) for n in range(15)]
    found = list(moments(seen, looks, [(0.0, 0), (10.45, 77)], 10.0))
    assert [round(moment.time_s, 6) for moment in found] == [n / 10 for n in range(10)]
    assert [moment.tokens for moment in found[:4]] == [0, 0, 1, 2]
    assert [moment.token_s for moment in found[:5]] == [None, None, 0.3, 0.1, None]
    assert [moment.live_cells for moment in found[:4]] == [5, 5, 5, 6]
    assert [moment.neighbour_bytes for moment in found[4:6]] == [0, 77]
    assert found[0].inside.some == pytest.approx(0.25)
    assert found[0].outside is None


def test_a_process_that_is_gone_gives_no_moment():
    seen = Seen(variant="fixed", stages=[(0.0, "pressed")])
    assert list(moments(seen, [look(1.0), look(2.0, resident_bytes=0)], [], 0.0))[1:] == []


def said(time_s: float, work_bytes: int) -> NeighbourSaid:
    return NeighbourSaid(event="work", time_s=time_s, taken_bytes=9, work_bytes=work_bytes)


def test_the_figures_of_a_scene_are_of_its_pressed_time():
    settled = messages.Looked(
        memory=look(0.0).memory, live_cells=77, masked_cells=0, lost_cells=0, governor_cpu_s=0.0
    )
    seen = Seen(variant="fixed", seconds=0.5, settled=settled, pressed_s=(101.0, 102.0))
    seen.live = [(100.0, 70), (101.5, 77), (103.0, 5)]
    seen.tokens = [messages.Token(time_s=101.0, seconds=seconds) for seconds in (0.1, 0.2)]
    looks = [look(101.0, 0, 50 * MIB), look(102.0, 1_000_000, 40 * MIB, swap_bytes=3, peak_bytes=60 * MIB)]
    found = result_of(seen, looks, [said(100.0, 0), said(101.0, 1000), said(102.0, 3000)])
    assert found.tokens_per_s == 4.0
    assert (found.p50_s, found.p99_s, found.max_s) == (0.1, 0.2, 0.2)
    assert found.neighbour_bytes_per_s == pytest.approx(2000.0)
    assert (found.stall, found.stall_full, found.outside) == (1.0, 0.5, None)
    assert found.decoding_from_s == pytest.approx(1.0)
    assert found.neighbour_work[0] == (0.0, 0)
    assert (found.final_cells, found.killed, found.restored) == (77, False, None)
    assert (found.least_resident_bytes, found.most_swapped_bytes) == (40 * MIB, 3)
    assert found.peak_resident_bytes == 60 * MIB


def test_a_scene_that_was_killed_before_its_first_token_has_no_latency():
    found = result_of(Seen(variant="fixed", pressed_s=(1.0, 1.5)), [], [])
    assert (found.killed, found.tokens, found.p99_s, found.max_s) == (True, 0, None, None)
    assert found.seconds == pytest.approx(0.5)
    assert found.neighbour_bytes_per_s is None
