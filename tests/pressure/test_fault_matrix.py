"""Everything that can go wrong with sensing, a row each: with the kernel's own files wherever that can be."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from sensing_help import (
    MACHINE,
    OWN,
    Watched,
    as_nobody,
    in_own_process,
    needs_psi,
    v2_group,
)

from psi_kv_governor.errors import SourceLostError
from psi_kv_governor.pressure import machine as machine_module
from psi_kv_governor.pressure.discovery import discover
from psi_kv_governor.pressure.psi import PsiFile
from psi_kv_governor.pressure.waker import arm
from psi_kv_governor.pressure.waking import find_waker

# -- the PSI file --------------------------------------------------------------------------------------------


def lose(path: Path) -> None:
    path.write_text("")  # what an open file answers whose cgroup is on its way out
    path.unlink()


def garble(path: Path) -> None:
    path.write_text("<html>\n")


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


BREAKS = [
    pytest.param(lose, "No such file", id="PSI file missing"),
    pytest.param(garble, "not a line of a PSI file", id="PSI file garbage"),
    pytest.param(truncate, "middle of a line", id="PSI file truncated"),
]


@pytest.mark.parametrize(("damage", "why"), BREAKS)
def test_at_start_the_next_rung_is_taken(v2, damage, why):
    damage(v2.root / OWN)
    discovery = discover(v2.root, {})
    assert discovery.source.name == str(v2.root / MACHINE)
    assert discovery.considered[1].why
    discovery.source.close()


@pytest.mark.parametrize(("damage", "why"), BREAKS)
def test_while_running_the_next_rung_is_taken_and_the_better_one_tried_again(watched, v2, damage, why):
    assert watched.sensor.read() is not None
    good = (v2.root / OWN).read_bytes()
    damage(v2.root / OWN)
    assert watched.sensor.read() is None
    assert watched.sensor.read().source == str(v2.root / MACHINE)
    (source, said), *more = watched.changes()
    assert (source, more) == (str(v2.root / MACHINE), [])
    assert why in said
    (v2.root / OWN).write_bytes(good)
    watched.later()
    assert watched.sensor.read().source == str(v2.root / MACHINE)  # it failed just now: no flapping
    watched.sensor._backoff._until_s.clear()  # some time has passed
    watched.later()
    assert watched.sensor.read().source == str(v2.root / OWN)
    assert watched.changes()[1:] == [(str(v2.root / OWN), "a better source answers")]


@pytest.mark.parametrize("number", [errno.EOPNOTSUPP, errno.ENOENT], ids=["EOPNOTSUPP", "ENOENT"])
def test_a_kernel_with_psi_off_says_how_to_turn_it_on(v2, monkeypatch, number):
    real = os.open

    def off(path, *rest, **named):
        if str(path).endswith(("memory.pressure", "pressure/memory")):
            raise OSError(number, os.strerror(number))
        return real(path, *rest, **named)

    monkeypatch.setattr(os, "open", off)
    discovery = discover(v2.root, {})
    assert discovery.source.name.startswith("headroom alone")
    assert all("psi=1" in candidate.why for candidate in discovery.considered[1:3])
    waking = find_waker(v2.root, {})
    assert waking.waker is None
    assert "psi=1" in waking.considered[-1].why
    discovery.source.close()


def test_psi_that_is_switched_off_for_the_cgroup_while_running_is_lost():
    """With the kernel's own switch."""
    with v2_group("switch") as folder:
        switch = folder / "cgroup.pressure"
        if not switch.exists():
            pytest.skip("this kernel has no cgroup.pressure: Linux 6.1 or later")
        file = PsiFile(folder / "memory.pressure")
        file.read()
        switch.write_text("0")
        with pytest.raises(SourceLostError, match="no longer answers"):
            file.read()
        switch.write_text("1")
        file.read()
        file.close()


def test_unreadable_says_whose_right_is_missing():
    with v2_group("unreadable") as folder:
        path = folder / "memory.pressure"
        path.chmod(0)
        with as_nobody(), pytest.raises(PermissionError):
            PsiFile(path)
        with as_nobody(), pytest.raises(PermissionError):
            arm(path)


def test_a_right_that_is_lost_while_running_is_a_lost_source(v2, monkeypatch, watched):
    watched.sensor.read()
    real = os.pread

    def denied(descriptor: int, size: int, offset: int) -> bytes:
        if str(Path(f"/proc/self/fd/{descriptor}").readlink()).endswith(OWN):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return real(descriptor, size, offset)

    monkeypatch.setattr(os, "pread", denied)
    assert watched.sensor.read() is None
    assert watched.sensor.read().source == str(v2.root / MACHINE)
    assert "Permission denied" in watched.changes()[0][1]


MOVES = """
import os, sys
from pathlib import Path
from psi_kv_governor.bus import Bus
from psi_kv_governor.pressure import machine
from psi_kv_governor.sensor import Sensor
first, second, remove = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3] == "removed"
machine._MOVED_EVERY_S = 0.0
(first / "cgroup.procs").write_text(str(os.getpid()))
bus = Bus()
sensor = Sensor(None, bus)
bus.subscribe(lambda event: print(event.source, event.why, sep=": "))
assert sensor.read().source == str(first / "memory.pressure"), sensor.name
assert sensor.sleeper.waker.name == f"trigger on {first}/memory.pressure", sensor.sleeper.waker
(second / "cgroup.procs").write_text(str(os.getpid()))
if remove:
    first.rmdir()
    sensor.wait(200.0)  # POLLERR ends it
    assert sensor.sleeper.lost
for _ in range(3):
    sensor.read()
assert sensor.read().source == str(second / "memory.pressure"), sensor.name
assert sensor.sleeper.waker.name == f"trigger on {second}/memory.pressure", sensor.sleeper.waker
sensor.close()
"""


@needs_psi
@pytest.mark.parametrize("how", ["removed", "moved"])
def test_the_cgroup_is_left_while_running(how):
    """With real cgroups and a real trigger. One that is removed answers ENODEV, and its trigger POLLERR."""
    with v2_group(f"{how}-1") as first, v2_group(f"{how}-2") as second:
        said = in_own_process(MOVES, first, second, how).splitlines()
        assert said[-1].startswith(f"{second}/memory.pressure: ")
        why = {"removed": "the cgroup is gone", "moved": "moved to another cgroup"}[how]
        assert any(why in line for line in said), said


def test_a_move_takes_nothing_away_that_is_still_right(tree, monkeypatch):
    """Between v1 cgroups: the stall is the whole machine's as before, the limit is another."""
    monkeypatch.setattr(machine_module, "_MOVED_EVERY_S", 0.0)
    tree.mounts(("v1", "/", "/sys/fs/cgroup/memory"))
    for name, limit in (("one", "400000000"), ("two", "200000000")):
        tree.v1(f"sys/fs/cgroup/memory/{name}", limit_in_bytes=limit, usage_in_bytes="100000000")
    tree.machine_psi()
    tree.membership("4:memory:/one")
    made = Watched(monkeypatch, tree.root, {})
    assert made.sensor.read().levels[0].limit_bytes == 400_000_000
    tree.membership("4:memory:/two")
    assert made.sensor.read() is None
    reading = made.sensor.read()
    assert (reading.source, reading.levels[0].limit_bytes) == (str(tree.root / MACHINE), 200_000_000)
    made.sensor.close()
