"""What a series of looks says: the first sign of need, what a poller would have seen."""

from __future__ import annotations

import os
import sys
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from trials_help import MIB, look

from psi_kv_governor.sandbox.sandbox import Sandbox
from psikv_bench.trials.series import first_signal, poll_time
from psikv_bench.watch import Watcher
from waiting import until

LINE = 16 * MIB


def test_the_stall_counts_from_the_onset_and_not_from_before():
    looks = [look(0.0, 50_000), look(1.0, 59_000), look(1.1, 68_000), look(1.2, 69_000), look(1.3, 90_000)]
    assert first_signal(looks, 1.05, 10_000, LINE) == (1.2, "stall")
    assert first_signal(looks, 1.15, 10_000, LINE) == (1.3, "stall")
    assert first_signal(looks, 1.05, 40_000, LINE) is None


def test_headroom_under_the_line_is_a_sign_as_well_and_the_first_of_both_counts():
    looks = [look(0.0), look(1.0, 2_000), look(1.1, 2_000, headroom_bytes=LINE - 1), look(1.2, 50_000)]
    assert first_signal(looks, 0.5, 10_000, LINE) == (1.1, "headroom")
    assert first_signal(looks, 1.15, 10_000, LINE) == (1.2, "stall")
    low_before = [look(0.0, headroom_bytes=0), look(1.0)]
    assert first_signal(low_before, 0.5, 10_000, LINE) is None


def test_without_a_look_there_is_no_sign():
    assert first_signal([], 0.0, 10_000, LINE) is None


def series(*avg10s, interval_s=0.1):
    return [look(round(number * interval_s, 6), avg10=avg10) for number, avg10 in enumerate(avg10s)]


def test_a_poller_sees_it_at_its_next_poll_after_the_average_rose():
    looks = series(*[0.0] * 12, *[0.3] * 40)
    assert poll_time(looks, 0.5, 0.1, 1.0) == 2.0
    assert poll_time(looks, 0.5, 0.1, 2.0) == 2.0
    assert poll_time(looks, 2.5, 0.1, 2.0) == 4.0


def test_a_poller_that_looks_between_two_peaks_never_sees_it():
    looks = series(*[0.0] * 12, *[0.3] * 6, *[0.0] * 20)
    assert poll_time(looks, 0.0, 0.1, 1.0) is None
    assert poll_time([], 0.0, 0.1, 1.0) is None


@given(
    rise=st.floats(0.0, 8.0),
    since=st.floats(0.0, 3.0),
    poll=st.sampled_from([0.5, 1.0, 2.0]),
)
def test_a_poller_is_never_early_and_at_most_one_poll_late(rise, since, poll):
    looks = [look(number * 0.01, avg10=0.5 if number * 0.01 >= rise else 0.0) for number in range(1200)]
    found = poll_time(looks, since, 0.1, poll)
    assert found is not None
    assert max(rise, since) < found + 1e-9
    assert found <= max(rise, since) + poll + 0.02


@pytest.mark.cgroup
def test_a_sandbox_is_watched_from_outside_and_lightly():
    taken = "input(); x = bytearray(48 << 20); print(1, flush=True); input()"
    with Sandbox(96 * MIB) as sandbox:
        child = sandbox.popen([sys.executable, "-c", taken], stdin=-1, stdout=-1)
        with Watcher(sandbox, child.pid, 0.003) as watch:
            began_s = time.monotonic()
            until(lambda: len(watch.looks) >= 3)  # before anything is taken
            child.stdin.write(b"\n")
            child.stdin.flush()
            child.stdout.readline()
            while len(watch.looks) < 30 or not watch.looks[-1].memory.anonymous_bytes > 48 * MIB:
                time.sleep(0.01)
            busy = watch.busy_share(time.monotonic() - began_s)
        child.communicate(b"\n")
    last = watch.looks[-1]
    assert last.memory.anonymous_bytes > 48 * MIB
    assert 0 < last.headroom_bytes < 48 * MIB
    assert max(one.headroom_bytes for one in watch.looks[:3]) > last.headroom_bytes + 24 * MIB
    assert 0.0 < busy < 1.0
    if sandbox.pressure_file is not None:
        assert last.inside.some_us >= watch.looks[0].inside.some_us >= 0
    assert not os.path.exists(sandbox.group.memory)  # noqa: PTH110
