"""The status socket: its owner sees how things stand, nobody else does, and the governor never waits."""

from __future__ import annotations

import gc
import json
import os
import socket
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path

import pytest
from psi_kv_governor.engine.simulated import SimulatedEngine, SimulatedStore

from fakes import FakeSource
from psi_kv_governor import socket_place, status_socket
from psi_kv_governor.config import GovernorConfig
from psi_kv_governor.governor import Governor
from psi_kv_governor.status_socket import StatusSocket

pytestmark = [
    pytest.mark.timeout(60),
    pytest.mark.skipif(not socket_place.able(), reason="this platform has no Unix sockets"),
]


@pytest.fixture(autouse=True)
def runtime(tmp_path, monkeypatch) -> Path:
    """The only folder in which sockets are looked for."""
    folder = tmp_path / "s"
    monkeypatch.setattr(socket_place, "folders", lambda: iter([folder]))
    return folder


@pytest.fixture
def governor():
    engine = SimulatedEngine(4096)
    engine.grow(3000)
    # Without a status socket of its own, whatever the default is.
    with_own = "status_socket" in GovernorConfig.__struct_fields__
    config = GovernorConfig(cooldown_s=0.0, **({"status_socket": False} if with_own else {}))
    made = Governor(engine, source=FakeSource(tick_s=0.5), store=SimulatedStore(1 << 30), config=config)
    yield made
    made.close()


@pytest.fixture
def opened(governor):
    made = StatusSocket(governor)
    made.start()
    yield made
    made.close()


def until(condition) -> None:
    end_s = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end_s
        time.sleep(0.005)


def threads() -> int:
    return sum(thread.name == "psi-kv-status" for thread in threading.enumerate())


class Lines:
    """What a client reads."""

    def __init__(self, path: Path) -> None:
        self.connection = socket_place.connect(path, 5.0)
        self._file = self.connection.makefile("rb")

    def next(self) -> dict:
        return json.loads(self._file.readline())

    def close(self) -> None:
        self._file.close()
        self.connection.close()


@pytest.fixture
def client(opened):
    made = Lines(opened.path)
    yield made
    made.close()


# -- what is said ------------------------------------------------------------------------------------------


def test_who_connects_is_told_who_speaks_and_then_how_things_stand(client, governor):
    hello = client.next()
    assert (hello["psi_kv_status"], hello["pid"]) == (status_socket.VERSION, os.getpid())
    assert hello["config"]["cooldown_s"] == 0.0
    update = client.next()
    assert update["status"]["live_cells"] == 3000
    assert update["events"] == []
    governor._sensor.source.stall = 0.6
    governor.step()
    update = client.next()
    while not update["events"]:
        update = client.next()
    assert update["status"]["spilled_cells"] > 0
    assert [event["event"] for event in update["events"]] == ["ModeChanged", "Trimmed"]


def test_a_new_client_is_told_the_last_events_once(opened, governor):
    for stall in (0.6, 0.05) * 30:
        governor._sensor.source.stall = stall
        governor.step()
    client = Lines(opened.path)
    client.next()
    first, second = client.next(), client.next()
    assert len(first["events"]) == status_socket.KEPT_EVENTS
    assert second["events"] == []
    client.close()


def test_updates_come_five_times_a_second(client):
    client.next()
    client.next()
    begin_s = time.monotonic()
    for _ in range(3):
        client.next()
    assert 0.5 < time.monotonic() - begin_s < 1.5


# -- who is told -------------------------------------------------------------------------------------------


def test_folder_and_socket_are_the_owners_alone(opened):
    assert opened.path.parent.stat().st_mode & 0o777 == 0o700
    assert opened.path.stat().st_mode & 0o777 == 0o600
    assert opened.path.name.startswith(f"{os.getpid()}-")


@pytest.mark.skipif(not hasattr(socket, "SO_PEERCRED"), reason="this kernel does not tell who connects")
def test_another_user_is_told_nothing(client, opened, monkeypatch):
    assert client.next()
    monkeypatch.setattr(socket_place, "same_user", lambda connection: False)
    stranger = socket_place.connect(opened.path)
    assert stranger.recv(100) == b""
    stranger.close()
    assert client.next()


@pytest.mark.skipif(not hasattr(socket, "SO_PEERCRED"), reason="this kernel does not tell who connects")
def test_the_kernel_is_asked_who_connects(monkeypatch):
    ours, theirs = socket.socketpair()
    assert socket_place.same_user(ours)
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    assert socket_place.same_user(ours) is (os.geteuid() == 0)  # root may look at everybody's
    ours.close()
    theirs.close()


@pytest.mark.parametrize("spoil", ["mode", "link", "file"])
def test_a_folder_that_others_could_enter_is_not_used(governor, runtime, tmp_path, spoil):
    if spoil == "mode":
        runtime.mkdir(mode=0o755)
    elif spoil == "link":
        (tmp_path / "elsewhere").mkdir(mode=0o700)
        runtime.symlink_to(tmp_path / "elsewhere")
    else:
        runtime.write_text("in the way")
    made = StatusSocket(governor)
    made.start()
    assert made.path is None
    assert str(runtime) in made.problem
    made.close()


def test_only_so_many_may_look(opened, client):
    more = [Lines(opened.path) for _ in range(status_socket.MOST_CLIENTS - 1)]
    for one in (client, *more):
        assert one.next()
    late = socket_place.connect(opened.path)
    assert late.recv(100) == b""
    for one in (late, *more):
        one.close()


# -- clients that misbehave --------------------------------------------------------------------------------


def test_a_client_that_does_not_read_holds_up_nobody(opened, client, monkeypatch):
    monkeypatch.setattr(status_socket, "UPDATE_S", 0.001)
    deaf = socket_place.connect(opened.path)
    client.next()
    for _ in range(1000):  # more than a socket's buffer
        assert client.next()
    assert len(opened._server._clients) == 2
    monkeypatch.setattr(status_socket, "STUCK_S", 0.05)
    until(lambda: client.next() and len(opened._server._clients) == 1)
    deaf.close()


def test_a_slow_client_gets_whole_lines_and_every_event(opened, governor, monkeypatch):
    monkeypatch.setattr(status_socket, "UPDATE_S", 0.002)
    slow = socket_place.connect(opened.path)
    slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    time.sleep(1.0)
    governor._sensor.source.stall = 0.6
    governor.step()
    slow.settimeout(5)
    file = slow.makefile("rb")
    events = []
    until(lambda: events.extend(json.loads(file.readline()).get("events", [])) or events)
    assert [event["event"] for event in events] == ["ModeChanged", "Trimmed"]
    file.close()
    slow.close()


def test_a_client_that_talks_or_hangs_up_is_let_go(opened, client):
    client.next()
    talker, hasty = Lines(opened.path), Lines(opened.path)
    hasty.close()
    talker.connection.send(b"GET / HTTP/1.0\r\n\r\n")
    until(lambda: client.next() and len(opened._server._clients) == 1)
    talker.close()


def test_with_nobody_connected_it_does_not_look_at_the_governor(opened, governor, monkeypatch):
    looked = []
    monkeypatch.setattr(governor, "status", lambda: looked.append(1))
    time.sleep(3 * status_socket.UPDATE_S)
    assert not looked


# -- the end -----------------------------------------------------------------------------------------------


def test_closing_it_removes_the_socket_and_sends_everybody_away(opened, client):
    client.next()
    path = opened.path
    opened.close()
    opened.close()
    assert not path.exists()
    assert threads() == 0
    while client._file.readline():
        pass


def test_a_governor_that_is_only_dropped_goes_with_its_socket(runtime):
    engine = SimulatedEngine(64)
    made = Governor(engine, source=FakeSource(), store=SimulatedStore(1))
    made.looked_at = StatusSocket(made)  # as the governor itself holds it
    made.looked_at.start()
    path, gone = made.looked_at.path, weakref.ref(made)
    assert path.exists()
    del made
    gc.collect()
    assert gone() is None
    assert not path.exists()
    until(lambda: threads() == 0)


def test_many_starts_and_ends_leave_nothing(governor, runtime):
    def descriptors() -> int:
        return len(list(Path("/proc/self/fd").iterdir())) if sys.platform == "linux" else 0

    before = descriptors()
    for _ in range(100):
        made = StatusSocket(governor)
        made.start()
        made.close()
    assert descriptors() == before
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
        timeout=30,
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
