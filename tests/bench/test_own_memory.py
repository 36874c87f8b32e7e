"""Memory of a process, by what it sees itself."""

from __future__ import annotations

import mmap
import os
import sys

import pytest

from psi_kv_governor.sandbox.process_memory import glance
from psi_kv_governor.sandbox.sandbox import Sandbox
from psikv_bench.process_memory import own_memory, peak_bytes, sample


def test_this_process_is_seen_to_grow():
    before = sample(os.getpid())
    # A mapping of its own: of the heap it could be pages that an earlier test left resident.
    with mmap.mmap(-1, 24 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as taken:
        taken.write(os.urandom(1 << 20) * 24)
        after = sample(os.getpid())
    assert after.anonymous_bytes - before.anonymous_bytes > 20 << 20
    # The kernel's running counts are behind by some pages for every core.
    assert after.peak_bytes + (8 << 20) >= after.resident_bytes >= after.anonymous_bytes


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


@pytest.mark.cgroup
def test_the_most_that_a_cgroup_ever_took_is_known_when_it_is_given_back():
    with Sandbox(64 << 20) as sandbox:
        taken = "import os; taken = os.urandom(20 << 20)"
        assert sandbox.popen([sys.executable, "-c", taken]).wait(60) == 0
        assert 20 << 20 < peak_bytes(sandbox.group) <= 64 << 20


def test_a_glance_sees_what_a_look_sees_to_some_pages():
    held = bytearray(os.urandom(1 << 20) * 24)
    quick, exact = glance(os.getpid()), own_memory()
    assert abs(quick.resident_bytes - exact.resident_bytes) < 8 << 20
    assert abs(quick.anonymous_bytes - exact.anonymous_bytes) < 8 << 20
    assert quick.peak_bytes >= quick.resident_bytes
    assert held
