"""memory.events as an estimate of stall."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from psi_kv_governor.errors import BadInputError, SourceLostError
from psi_kv_governor.pressure.cgroup import find_cgroups
from psi_kv_governor.pressure.headroom import HeadroomReader
from psi_kv_governor.pressure.limit_events import LimitEvents, events_of, parse_events
from psi_kv_governor.pressure.machine import MachineSource
from psi_kv_governor.pressure.psi import PsiTotals

EVENTS = "low {low}\nhigh {high}\nmax {max}\noom {oom}\noom_kill {oom}\noom_group_kill 0\n"


def text(low=0, high=0, max=0, oom=0) -> str:
    return EVENTS.format(low=low, high=high, max=max, oom=oom)


def test_only_a_limit_that_was_met_counts():
    assert parse_events(text(low=9).encode()) == PsiTotals(0, 0)
    assert parse_events(text(high=2, max=3).encode()) == PsiTotals(500, 0)
    assert parse_events(text(oom=1).encode()) == PsiTotals(2_000_000, 2_000_000)


@given(st.binary())
def test_any_bytes_give_totals_or_bad_input(data):
    try:
        totals = parse_events(data)
    except BadInputError:
        return
    assert min(totals) >= 0


@pytest.mark.parametrize("data", [b"", b"high 3", b"high -3\n", b"high 3\nmax", b"high x\n", b"high 3\n\n"])
def test_what_is_cut_or_no_list_is_refused(data):
    with pytest.raises(BadInputError):
        parse_events(data)


def test_events_become_stall_in_a_reading(tree):
    tree.membership("0::/app")
    tree.mounts(("v2", "/", "/sys/fs/cgroup"))
    path = tree.write("sys/fs/cgroup/app/memory.events", text(max=1000))
    tree.v2("sys/fs/cgroup/app", some_us=None)
    cgroups = find_cgroups(tree.root)
    assert events_of(cgroups) == path
    clock = iter([1.0, 1.5, 2.0])
    source = MachineSource(LimitEvents(path), HeadroomReader(cgroups, tree.root), "e", lambda: next(clock))
    source.read()
    path.write_text(text(max=1500))
    assert source.read().some == pytest.approx(0.1)  # 500 events of 100 us in half a second
    path.write_text(text(max=1500, oom=1))
    reading = source.read()
    assert (reading.some, reading.full) == (1.0, 1.0)
    source.close()


def test_a_cgroup_that_is_gone_is_said(tmp_path):
    path = tmp_path / "memory.events"
    path.write_text(text())
    events = LimitEvents(path)
    path.write_text("")
    with pytest.raises(SourceLostError, match="no longer answers"):
        events.read()
    path.write_text("nonsense")
    with pytest.raises(SourceLostError, match="not a list"):
        events.read()
    events.close()


def test_without_the_file_the_error_says_why(tmp_path):
    with pytest.raises(FileNotFoundError):
        LimitEvents(tmp_path / "memory.events")


def test_the_nearest_cgroup_that_counts_is_taken(tree):
    tree.membership("0::/a/b")
    tree.mounts(("v2", "/", "/sys/fs/cgroup"))
    tree.v2("sys/fs/cgroup/a/b", some_us=None)
    above = tree.write("sys/fs/cgroup/a/memory.events", text())
    assert events_of(find_cgroups(tree.root)) == above
    above.unlink()
    assert events_of(find_cgroups(tree.root)) is None
