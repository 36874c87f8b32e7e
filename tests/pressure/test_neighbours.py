"""What governors of one user say to each other: what is heard, and what is not believed any more."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from psi_kv_governor.pressure import neighbours as module
from psi_kv_governor.pressure.neighbours import Neighbours
from psi_kv_governor.pressure.reading import MACHINE, Level, Standing
from waiting import PATIENCE_S

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="there are no file locks of this kind")

HERE = (Level(name=MACHINE, headroom_bytes=1, limit_bytes=2),)


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def say(one: Neighbours, levels=HERE, **more) -> None:
    said = {
        "last_used_s": 1.0,
        "trimmable_bytes": 2,
        "masked_bytes": 3,
        "restoring": False,
        "claim_bytes": 0,
        "resident_bytes": 4,
        **more,
    }
    one.say(levels, Standing(**said))


@pytest.fixture
def pair(tmp_path):
    clock = Clock()
    one, other = Neighbours(tmp_path, clock), Neighbours(tmp_path, clock)
    yield one, other, clock
    one.close()
    other.close()


def test_each_hears_what_the_other_says(pair):
    one, other, _ = pair
    say(one, last_used_s=7.0, trimmable_bytes=11, masked_bytes=12, restoring=True, claim_bytes=13)
    (heard,) = other.read(HERE)
    assert heard.levels == (MACHINE,)
    assert (heard.last_used_s, heard.trimmable_bytes, heard.masked_bytes) == (7.0, 11, 12)
    assert (heard.restoring, heard.claim_bytes) == (True, 13)
    say(one, restoring=False)
    assert other.read(HERE)[0].restoring is False


def test_the_size_of_its_process_is_asked_of_the_kernel(pair):
    one, other, _ = pair
    say(one, resident_bytes=4)
    assert other.read(HERE)[0].resident_bytes > 1 << 20  # this process


def test_levels_are_matched_by_the_cgroup_and_not_by_its_path(pair, tmp_path):
    """As two containers see one slice under different paths."""
    one, other, _ = pair
    folder, link = tmp_path / "slice", tmp_path / "seen elsewhere"
    folder.mkdir()
    link.symlink_to(folder)
    say(one, [Level(name=str(folder)), Level(name=str(tmp_path / "gone"))])
    assert other.read([Level(name=str(link)), Level(name="earlyoom")])[0].levels == (str(link),)


def test_a_restore_that_is_stuck_keeps_nobody_waiting(pair):
    one, other, clock = pair
    say(one, restoring=True, claim_bytes=13)
    clock.now_s += module._STALE_S
    (heard,) = other.read(HERE)
    assert (heard.restoring, heard.claim_bytes) == (False, 0)


def test_work_is_told_while_it_runs(pair):
    one, other, _ = pair
    one.say_work([(1.0, 2.0), (3.0, float("inf"))])
    assert other.read(HERE)[0].work == ((1.0, 2.0), (3.0, 100.0))  # until now


def test_a_sidecar_tells_of_the_programs_that_it_governs(tmp_path):
    with subprocess.Popen(["sleep", "600"]) as child:
        one = Neighbours(tmp_path, processes=lambda: [child.pid])
        other = Neighbours(tmp_path)
        say(one)
        assert 0 < other.read(HERE)[0].resident_bytes < 8 << 20  # of sleep, not of this Python
        child.kill()
        one.close()
        other.close()


def test_one_that_ends_is_gone(pair):
    one, other, clock = pair
    assert len(other.read(HERE)) == 1
    one.close()
    clock.now_s += 1.0
    assert other.read(HERE) == ()


KILLED = """
import os, signal, sys
from pathlib import Path
from psi_kv_governor.pressure.neighbours import Neighbours
one = Neighbours(Path(sys.argv[1]))
print(one.problem, flush=True)
sys.stdin.readline()
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_the_file_of_a_killed_process_is_removed_by_the_next_who_looks(tmp_path):
    clock = Clock()
    other = Neighbours(tmp_path, clock)
    command = [sys.executable, "-c", KILLED, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout.readline() == b"\n"
        assert [one.id.split("-")[0] for one in other.read(HERE)] == [str(child.pid)]
        child.communicate(b"\n", timeout=PATIENCE_S)
    clock.now_s += 1.0
    assert other.read(HERE) == ()
    assert len(list(tmp_path.iterdir())) == 1  # its own
    other.close()
    assert list(tmp_path.iterdir()) == []


def test_a_forked_child_does_not_keep_its_parent_alive(tmp_path):
    """The lock goes with the parent, though the child has a copy of the descriptor."""
    clock = Clock()
    one, other = Neighbours(tmp_path, clock), Neighbours(tmp_path, clock)
    (reading, writing), (hearing, telling) = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        os.write(telling, b"x")
        os.read(reading, 1)
        os._exit(0)
    try:
        assert os.read(hearing, 1) == b"x"  # it is past the fork
        path = one._path
        os.close(one._descriptor)  # as a kill would
        one._descriptor = -1
        other.read(HERE)
        clock.now_s += 1.0
        assert other.read(HERE) == ()
        assert not path.exists()
    finally:
        os.write(writing, b"x")
        os.waitpid(child, 0)
        one._end.detach()
        other.close()


@pytest.mark.parametrize("garbage", [b"", b"\0" * 8, b"x" * 5000, b"\xff\xff\xff\xff\x7f\xff\xff\xff"])
def test_garbage_is_not_heard(tmp_path, garbage):
    other = Neighbours(tmp_path)
    (tmp_path / "1-1.room").write_bytes(garbage)
    assert other.read(HERE) == ()
    other.close()


@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied"), RuntimeError("no home")])
def test_a_user_without_any_folder_is_only_not_known_to_the_others(monkeypatch, error):
    def none():
        raise error

    monkeypatch.setattr(module, "folders", none)
    one = Neighbours()
    assert "can't be told of this one: " in one.problem
    assert one.read(HERE) == ()
    one.close()


def test_a_folder_that_cannot_be_had_is_said_and_nothing_else(tmp_path):
    one = Neighbours(tmp_path / "none")
    assert "can't be told" in one.problem
    say(one)
    one.say_work([(1.0, 2.0)])
    assert one.read(HERE) == ()
    one.close()
    one.close()
