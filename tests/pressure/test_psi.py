"""The PSI parser, the file that stays open, and shares from counters."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sensing_help import open_descriptors

from psi_kv_governor.errors import BadInputError, SourceLostError
from psi_kv_governor.pressure.psi import STALE_S, WINDOW_S, PsiFile, PsiTotals, StallMeter, parse_psi

COUNTERS = st.integers(min_value=0, max_value=2**64 - 1)
KERNEL_PSI = Path("/proc/pressure/memory")


def psi_text(some_us: int, full_us: int | None) -> bytes:
    text = f"some avg10=1.25 avg60=0.00 avg300=100.00 total={some_us}\n"
    if full_us is not None:
        text += f"full avg10=0.00 avg60=0.00 avg300=0.00 total={full_us}\n"
    return text.encode()


@given(COUNTERS, COUNTERS)
def test_what_the_kernel_writes_is_read(some_us, full_us):
    assert parse_psi(psi_text(some_us, full_us)) == PsiTotals(some_us, full_us)


def test_a_file_without_a_full_line_counts_no_full_stall():
    assert parse_psi(psi_text(7, None)) == PsiTotals(7, 0)


@given(st.binary())
def test_garbage_is_refused_and_nothing_else_is_raised(data):
    with pytest.raises(BadInputError):
        parse_psi(data)


@given(COUNTERS, COUNTERS, st.data())
def test_a_cut_file_never_gives_a_smaller_number(some_us, full_us, data):
    text = psi_text(some_us, full_us)
    cut = text[: data.draw(st.integers(0, len(text) - 1))]
    try:
        totals = parse_psi(cut)
    except BadInputError:
        return
    assert totals == PsiTotals(some_us, 0)  # cut exactly between the two lines


@given(COUNTERS, COUNTERS, st.data())
def test_a_changed_byte_gives_numbers_in_range_or_is_refused(some_us, full_us, data):
    text = bytearray(psi_text(some_us, full_us))
    text[data.draw(st.integers(0, len(text) - 1))] = data.draw(st.integers(0, 255))
    try:
        totals = parse_psi(bytes(text))
    except BadInputError:
        return
    assert 0 <= totals.some_us < 2**64
    assert 0 <= totals.full_us < 2**64


@pytest.mark.parametrize("total", ["-5", "1e3", "0x10", "", str(2**64), "9" * 5000, "٣"])
def test_a_counter_that_the_kernel_cannot_mean_is_refused(total):
    text = f"some avg10=0.00 avg60=0.00 avg300=0.00 total={total}\n".encode()
    with pytest.raises(BadInputError, match="PSI"):
        parse_psi(text)


def test_the_first_look_gives_nothing():
    assert StallMeter().add(5.0, PsiTotals(10**9, 10**9)) == (0.0, 0.0, 0.0)


def test_shares_are_stall_by_wall_time():
    meter = StallMeter()
    meter.add(10.0, PsiTotals(1_000_000, 500_000))
    assert meter.add(10.5, PsiTotals(1_100_000, 550_000)) == pytest.approx((0.5, 0.2, 0.1))


def test_a_counter_that_goes_back_is_no_stall():
    meter = StallMeter()
    meter.add(1.0, PsiTotals(900_000, 900_000))
    assert meter.add(2.0, PsiTotals(0, 0)) == (0.0, 0.0, 0.0)
    assert meter.add(3.0, PsiTotals(250_000, 0)) == pytest.approx((1.0, 0.25, 0.0))


def test_looks_within_a_window_of_the_first_give_nothing_yet():
    meter = StallMeter()
    meter.add(1.0, PsiTotals(0, 0))
    for look in range(1, 10):
        assert meter.add(1.0 + look / 100, PsiTotals(800 * look, 0)) == (0.0, 0.0, 0.0)
    assert meter.add(1.1, PsiTotals(8000, 0)) == pytest.approx((0.1, 0.08, 0.0))


def test_a_look_too_soon_is_of_the_last_window():
    meter = StallMeter()
    meter.add(1.0, PsiTotals(0, 0))
    meter.add(2.0, PsiTotals(100_000, 0))
    interval_s, some, _ = meter.add(2.001, PsiTotals(101_000, 0))  # 1 ms of 1 ms alone would read as 1.0
    assert interval_s == pytest.approx(WINDOW_S)
    assert some == pytest.approx((0.1 * 0.099 + 0.001) / 0.1)  # of the second before, 99 ms are in the window
    assert meter.add(3.0, PsiTotals(200_000, 0)).some == pytest.approx(0.1, abs=1e-3)


@pytest.mark.parametrize("pause_ms", [5, 10, 20, 33, 50])
def test_ten_ms_of_stall_show_as_a_tenth_at_once_and_for_a_tenth_of_a_second(pause_ms):
    meter = StallMeter()
    for ms in range(0, 1000, pause_ms):
        assert meter.add(ms / 1e3, PsiTotals(0, 0)).some == 0.0
    seen = [meter.add((1000 + ms) / 1e3, PsiTotals(10_000, 5_000)) for ms in range(0, 200, pause_ms)]
    assert seen[0].some == pytest.approx(0.1)
    assert seen[0].full == pytest.approx(0.05)
    assert all(stall.interval_s == pytest.approx(WINDOW_S) for stall in seen)
    # It fades as the window leaves the pause in which it happened.
    assert [stall.some for stall in seen] == sorted((stall.some for stall in seen), reverse=True)
    assert seen[math.ceil(WINDOW_S * 1e3 / pause_ms) + 1].some == pytest.approx(0.0, abs=1e-9)


def test_after_rare_looks_the_first_quick_one_shows_a_stall_too():
    meter = StallMeter()
    meter.add(1.0, PsiTotals(0, 0))
    meter.add(1.5, PsiTotals(0, 0))
    assert meter.add(1.51, PsiTotals(10_000, 0)) == pytest.approx((0.1, 0.1, 0.0))


def test_a_sleep_that_ends_a_little_early_is_a_whole_window():
    meter = StallMeter()
    meter.add(1.0, PsiTotals(0, 0))
    assert meter.add(1.0995, PsiTotals(9_950, 0)) == pytest.approx((0.0995, 0.1, 0.0))


@pytest.mark.parametrize("later_s", [STALE_S + 1.0, 86_400.0, -5.0])
def test_a_clock_that_jumps_is_no_stall(later_s):
    meter = StallMeter()
    meter.add(100.0, PsiTotals(0, 0))
    assert meter.add(100.0 + later_s, PsiTotals(9 * 10**9, 9 * 10**9)) == (0.0, 0.0, 0.0)
    after = meter.add(100.5 + later_s, PsiTotals(9 * 10**9 + 50_000, 9 * 10**9))
    assert after == pytest.approx((0.5, 0.1, 0.0))


@given(st.lists(st.tuples(st.floats(0, 10), COUNTERS, COUNTERS), min_size=1))
def test_shares_stay_shares_whatever_comes_in(looks):
    meter = StallMeter()
    time_s = 0.0
    for number, (pause_s, some_us, full_us) in enumerate(looks):
        time_s += pause_s
        interval_s, some, full = meter.add(time_s, PsiTotals(some_us, full_us))
        assert 0.0 <= some <= 1.0
        assert 0.0 <= full <= 1.0
        assert interval_s >= 0.0
        if number == 0 or interval_s == 0.0:
            assert (some, full) == (0.0, 0.0)
        else:
            assert WINDOW_S - 0.011 <= interval_s <= STALE_S


@given(st.lists(st.integers(0, 10**6), min_size=2, max_size=6))
def test_the_shares_of_a_steady_clock_add_up_to_the_stall(steps):
    """The sum of share times interval is the stall that the counters saw."""
    meter = StallMeter()
    total_us, seen_s = 0, 0.0
    meter.add(0.0, PsiTotals(0, 0))
    for number, step_us in enumerate(steps, start=1):
        total_us += step_us
        stall = meter.add(number * 1.0, PsiTotals(total_us, 0))
        seen_s += stall.some * stall.interval_s
    assert seen_s == pytest.approx(total_us / 1e6)


@given(st.lists(st.tuples(st.floats(0.0, 0.3), st.integers(0, 200_000)), min_size=1, max_size=60))
def test_few_looks_are_kept_however_often_one_looks(looks):
    meter, time_s, total_us = StallMeter(), 0.0, 0
    for pause_s, stall_us in looks:
        time_s, total_us = time_s + pause_s, total_us + stall_us
        meter.add(time_s, PsiTotals(total_us, 0))
        assert len(meter._looks) <= 23


def test_a_day_of_calm_looks_is_not_kept():
    """The calm loop looks five times a second: a look kept of each would be two megabytes an hour."""
    meter = StallMeter()
    for number in range(1000):
        meter.add(0.2 * number, PsiTotals(0, 0))
    assert len(meter._looks) <= 23


def test_the_file_stays_open_and_shows_what_is_new(tmp_path):
    path = tmp_path / "memory.pressure"
    path.write_bytes(psi_text(1, 1))
    file = PsiFile(path)
    assert file.read() == PsiTotals(1, 1)
    path.unlink()  # the open file goes on answering
    assert file.read() == PsiTotals(1, 1)
    file.close()
    file.close()


def test_a_lost_file_is_opened_again_once(tmp_path):
    path = tmp_path / "memory.pressure"
    path.write_bytes(psi_text(1, 1))
    file = PsiFile(path)
    path.write_bytes(b"")  # what a file answers that is on its way out
    path.unlink()
    path.write_bytes(psi_text(2, 2))
    assert file.read() == PsiTotals(2, 2)
    file.close()


def test_a_file_that_is_gone_is_lost_and_leaves_no_descriptor(tmp_path):
    path = tmp_path / "memory.pressure"
    path.write_bytes(psi_text(1, 1))
    file = PsiFile(path)
    path.write_bytes(b"")
    path.unlink()
    before = open_descriptors()
    for _ in range(3):
        with pytest.raises(SourceLostError, match=r"memory\.pressure no longer answers: No such file"):
            file.read()
    assert open_descriptors() == before - 1


def test_a_fifo_in_its_place_does_not_block(tmp_path):
    fifo = tmp_path / "memory.pressure"
    os.mkfifo(fifo)
    with pytest.raises(OSError, match="Illegal seek"):
        PsiFile(fifo)


@pytest.mark.skipif(not KERNEL_PSI.exists(), reason="this kernel keeps no PSI: boot with psi=1")
def test_this_kernel_is_read_and_counts_upwards():
    file = PsiFile(KERNEL_PSI)
    first, second = file.read(), file.read()
    file.close()
    assert second.some_us >= first.some_us
    assert second.full_us >= first.full_us
