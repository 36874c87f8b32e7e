"""How a status socket is found, and that nothing is left of it."""

from __future__ import annotations

import contextlib
import gc
import os
import subprocess
import sys
import weakref
from pathlib import Path

import pytest

from fakes import FakeSource
from psi_kv_governor import socket_place
from psi_kv_governor.engines.simulated import SimulatedEngine
from psi_kv_governor.governor import Governor
from psi_kv_governor.status_socket import StatusSocket
from waiting import PATIENCE_S, until

pytestmark = pytest.mark.skipif(not socket_place.able(), reason="this platform has no Unix sockets")


# -- the end -----------------------------------------------------------------------------------------------


def test_closing_it_removes_the_socket_and_sends_everybody_away(opened, client):
    client.next()
    path, thread = opened.path, opened._server._thread
    opened.close()
    opened.close()
    assert not path.exists()
    assert not thread.is_alive()
    while client._file.readline():
        pass


def test_a_governor_that_is_only_dropped_goes_with_its_socket(runtime):
    engine = SimulatedEngine()
    made = Governor(engine, source=FakeSource())
    made.looked_at = StatusSocket(made)  # as the governor itself holds it
    made.looked_at.start()
    path, gone, thread = made.looked_at.path, weakref.ref(made), made.looked_at._server._thread
    assert path.exists()
    del made
    gc.collect()
    assert gone() is None
    assert not path.exists()
    until(lambda: not thread.is_alive())


def test_many_starts_and_ends_leave_nothing(governor, runtime):
    def descriptors() -> set[str]:
        found = set()  # by what they are: those that earlier tests left may be closed meanwhile
        for one in Path("/proc/self/fd").iterdir() if sys.platform == "linux" else ():
            with contextlib.suppress(OSError):  # that of the look itself
                found.add(f"{one.name} {one.readlink()}")
        return found

    before = descriptors()
    for _ in range(100):
        made = StatusSocket(governor)
        made.start()
        made.close()
    until(lambda: not descriptors() - before, "descriptors are left")
    assert list(runtime.iterdir()) == []
    assert governor._bus._subscribers == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_leaves_the_parents_socket_alone(opened, governor):
    child = os.fork()
    if not child:
        governor.trim(0.5)  # an event
        opened.close()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert opened.path.exists()
    assert [found.pid for found in socket_place.find()] == [os.getpid()]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_does_not_keep_the_socket_open(opened, client):
    client.next()
    hold, release = os.pipe()
    child = os.fork()
    if not child:
        os.close(release)
        os.read(hold, 1)
        os._exit(0)
    path = opened.path
    opened.close()
    while client._file.readline():  # ends although the child lives
        pass
    with pytest.raises(OSError, match=r"No such file|refused"):
        socket_place.connect(path)
    os.close(release)
    os.waitpid(child, 0)
    os.close(hold)


# -- finding it --------------------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
from pathlib import Path
from psi_kv_governor import socket_place
socket_place.folders = lambda: iter([Path(sys.argv[1])])
server, path = socket_place.listen()
print(path, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def left_behind(runtime: Path) -> Path:
    """The socket of a process that was killed."""
    package = str(Path(socket_place.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(runtime)],
        env={**os.environ, "PYTHONPATH": package},
        capture_output=True,
        timeout=PATIENCE_S,
        check=False,
    )
    return Path(done.stdout.decode().strip())


def test_the_socket_of_a_killed_process_is_removed_by_whoever_looks(opened, runtime):
    path = left_behind(runtime)
    assert path.exists()
    assert [found.path for found in socket_place.find()] == [opened.path]
    assert not path.exists()


def test_a_new_governor_clears_away_what_killed_ones_left(runtime, governor):
    path = left_behind(runtime)
    made = StatusSocket(governor)
    made.start()
    assert not path.exists()
    made.close()


def test_other_files_in_the_folder_are_left_alone(opened, runtime):
    other = runtime / "notes.txt"
    other.write_text("mine")
    (runtime / "12-x.sock").write_text("not a name of ours")
    assert len(socket_place.find()) == 1
    assert other.read_text() == "mine"
    assert (runtime / "12-x.sock").exists()


def test_two_governors_of_a_process_have_a_socket_each(opened, governor):
    other = StatusSocket(governor)
    other.start()
    assert {found.path for found in socket_place.find()} == {opened.path, other.path}
    other.close()


def test_a_path_too_long_for_a_socket_is_passed_over(monkeypatch, tmp_path):
    monkeypatch.undo()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / ("x" * 100)))
    (tmp_path / ("x" * 100)).mkdir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / ("y" * 100)))
    found = list(socket_place.folders())
    assert all(len(os.fsencode(folder)) < 100 for folder in found)
    assert found[-1].name == f"psi-kv-{os.getuid()}"
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/")
    assert next(socket_place.folders()) == Path("/psi-kv")


def test_where_there_is_no_folder_or_no_such_socket_the_governor_works_without(governor, monkeypatch):
    monkeypatch.setattr(socket_place, "folders", lambda: iter(()))
    made = StatusSocket(governor)
    made.start()
    assert "no status socket" in made.problem
    monkeypatch.setattr(socket_place, "able", lambda: False)
    made.start()
    assert "no Unix sockets" in made.problem
    governor.step()
    made.close()
