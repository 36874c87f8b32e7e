"""Memory of a process."""

from __future__ import annotations

from psi_kv_governor.sandbox.process_memory import Sample, glance

STATUS = "Name:\tx\nVmHWM:\t 40 kB\nVmRSS:\t 30 kB\nRssAnon:\t 20 kB\nVmSwap:\t 5 kB\nThreads:\t1\n"


def test_the_kernel_s_kilobytes_are_turned_into_bytes(tmp_path):
    (tmp_path / "proc/7").mkdir(parents=True)
    (tmp_path / "proc/7/status").write_text(STATUS)
    assert glance(7, root=tmp_path) == Sample(
        resident_bytes=30 * 1024, anonymous_bytes=20 * 1024, swap_bytes=5 * 1024, peak_bytes=40 * 1024
    )


def test_a_process_that_is_gone_and_a_zombie_give_none(tmp_path):
    assert glance(1, root=tmp_path) is None
    (tmp_path / "proc/7").mkdir(parents=True)
    (tmp_path / "proc/7/status").write_text("Name:\tgone\nState:\tZ (zombie)\n")
    assert glance(7, root=tmp_path) is None
