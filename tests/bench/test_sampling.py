"""Memory of a process, and percentiles."""

from __future__ import annotations

import math
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from psi_kv_governor.bench.sampling import percentile, sample

NUMBERS = st.lists(st.floats(-1e6, 1e6), min_size=1)


def test_this_process_is_seen_to_grow():
    before = sample(os.getpid())
    taken = bytearray(os.urandom(1 << 20) * 24)
    after = sample(os.getpid())
    assert after.anonymous_bytes - before.anonymous_bytes > 20 << 20
    assert after.peak_bytes >= after.resident_bytes >= after.anonymous_bytes
    del taken


def test_a_process_that_is_gone_gives_none(tmp_path):
    assert sample(1, root=tmp_path) is None


def test_a_zombie_gives_none(tmp_path):
    (tmp_path / "proc/7").mkdir(parents=True)
    (tmp_path / "proc/7/smaps_rollup").write_text("")
    (tmp_path / "proc/7/status").write_text("Name:\tgone\nState:\tZ (zombie)\n")
    assert sample(7, root=tmp_path) is None


def test_the_kernel_s_kilobytes_are_turned_into_bytes(tmp_path):
    (tmp_path / "proc/7").mkdir(parents=True)
    rollup = "00-ff ---p 00 00:00 0 [rollup]\nRss:    30 kB\nAnonymous:  20 kB\nSwap:   5 kB\n"
    (tmp_path / "proc/7/smaps_rollup").write_text(rollup)
    (tmp_path / "proc/7/status").write_text("Name:\tx\nVmHWM:\t 40 kB\n")
    seen = sample(7, root=tmp_path)
    assert (seen.resident_bytes, seen.anonymous_bytes, seen.swap_bytes, seen.peak_bytes) == (
        30 * 1024, 20 * 1024, 5 * 1024, 40 * 1024,
    )  # fmt: skip


@given(NUMBERS, st.floats(0, 1))
def test_a_percentile_is_one_of_the_values_and_splits_them(values, share):
    found = percentile(values, share)
    assert found in values
    assert sum(value <= found for value in values) >= share * len(values)
    assert sum(value < found for value in values) < max(1, math.ceil(share * len(values)))


def test_known_percentiles():
    values = [float(number) for number in range(1, 101)]
    assert (percentile(values, 0.5), percentile(values, 0.99), percentile(values, 1.0)) == (50.0, 99.0, 100.0)


def test_no_values_have_no_percentile():
    with pytest.raises(ValueError, match="no values"):
        percentile([], 0.5)
