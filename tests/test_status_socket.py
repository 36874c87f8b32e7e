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

from fakes import FakeSource
from psi_kv_governor import socket_place, status_messages, status_server
from psi_kv_governor.cache import Result
from psi_kv_governor.config import GovernorConfig
from psi_kv_governor.engines.simulated import CELL_BYTES, SimulatedEngine
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
    engine = SimulatedEngine()
    engine.add_cache(4096).sequence(0).running = True
    engine.decode(3000)
    config = GovernorConfig(cooldown_s=0.0, status_socket=False)
    made = Governor(engine, source=FakeSource(tick_s=0.5), config=config, name="my program")
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
    assert (hello["psi_kv_status"], hello["pid"]) == (status_messages.VERSION, os.getpid())
    assert hello["name"] == "my program"
    assert hello["config"]["cooldown_s"] == 0.0
    update = client.next()
    assert update["status"]["live_cells"] == 3000
    assert update["events"] == []
    governor._sensor.source.stall = 0.6
    governor.step()
    update = client.next()
    while not update["events"]:
        update = client.next()
    assert update["status"]["masked_cells"] > 0
    assert [event["event"] for event in update["events"]] == ["CacheOpened", "ModeChanged", "Trimmed"]


def test_a_new_client_is_told_the_last_events_once(opened, governor):
    for _ in range(status_server.KEPT_EVENTS):
        governor.trim(0.1)
        governor.restore()
    client = Lines(opened.path)
    client.next()
    first, second = client.next(), client.next()
    assert len(first["events"]) == status_server.KEPT_EVENTS
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


def connected_by_child(name: str, uid: int | None) -> int:
    """A forked child, of another user if need be, that connects and waits to be let go."""
    child = os.fork()
    if child:
        return child
    try:
        if uid is not None:
            os.setuid(uid)
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(f"\0{name}")
            client.recv(1)
    except BaseException:
        os._exit(1)
    os._exit(0)


@pytest.mark.skipif(not hasattr(socket, "SO_PEERCRED"), reason="this kernel does not tell who connects")
@pytest.mark.parametrize("other", [False, True])
def test_the_kernel_is_asked_who_connects(monkeypatch, other):
    name = f"psi-kv-test-{os.getpid()}-{other}"  # in no folder: another user could not enter ours
    by_root = os.geteuid() == 0
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(f"\0{name}")
        server.listen()
        child = connected_by_child(name, 65534 if other and by_root else None)
        connection, _ = server.accept()
        if other and not by_root:
            monkeypatch.setattr(os, "getuid", lambda: 65534)
        assert socket_place.same_user(connection) is not other
        connection.close()
        assert os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize("spoil", ["mode", "owner", "link", "file"])
def test_a_folder_that_others_could_enter_is_not_used(governor, runtime, tmp_path, monkeypatch, spoil):
    if spoil == "mode":
        runtime.mkdir(mode=0o755)
    elif spoil == "owner":
        runtime.mkdir(mode=0o700)
        monkeypatch.setattr(socket_place, "_own_id", lambda: os.getuid() + 1)
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


def test_nobody_is_looked_for_in_a_folder_that_others_could_enter(opened, runtime):
    assert [found.pid for found in socket_place.find()] == [os.getpid()]
    runtime.chmod(0o755)
    assert socket_place.find() == []


def test_only_so_many_may_look(opened, client):
    more = [Lines(opened.path) for _ in range(status_server.MOST_CLIENTS - 1)]
    for one in (client, *more):
        assert one.next()
    late = socket_place.connect(opened.path)
    assert late.recv(100) == b""
    for one in (late, *more):
        one.close()


# -- clients that misbehave --------------------------------------------------------------------------------


def test_a_client_that_does_not_read_holds_up_nobody(opened, client, monkeypatch):
    monkeypatch.setattr(status_server, "UPDATE_S", 0.001)
    deaf = socket_place.connect(opened.path)
    client.next()
    for _ in range(1000):  # more than a socket's buffer
        assert client.next()
    assert len(opened._server._clients) == 2
    monkeypatch.setattr(status_server, "STUCK_S", 0.05)
    until(lambda: client.next() and len(opened._server._clients) == 1)
    deaf.close()


def test_a_slow_client_gets_whole_lines_and_every_event(opened, governor, monkeypatch):
    monkeypatch.setattr(status_server, "UPDATE_S", 0.002)
    slow = socket_place.connect(opened.path)
    slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    time.sleep(1.0)
    governor._sensor.source.stall = 0.6
    governor.step()
    slow.settimeout(5)
    file = slow.makefile("rb")
    events = []
    until(lambda: events.extend(json.loads(file.readline()).get("events", [])) or events)
    assert [event["event"] for event in events] == ["CacheOpened", "ModeChanged", "Trimmed"]
    file.close()
    slow.close()


def test_a_client_that_hangs_up_or_talks_without_an_end_is_let_go(opened, client):
    client.next()
    talker, hasty = Lines(opened.path), Lines(opened.path)
    hasty.close()
    talker.connection.send(b"x" * (status_server.MOST_COMMAND_BYTES + 1))
    until(lambda: client.next() and len(opened._server._clients) == 1)
    talker.close()


# -- commands ----------------------------------------------------------------------------------------------


def ask(client: Lines, command: dict | bytes) -> dict:
    line = command if isinstance(command, bytes) else json.dumps({"psi_kv_command": 1, **command}).encode()
    client.connection.sendall(line + b"\n")
    while (answer := client.next()).get("says") != "answer":
        pass
    return answer


def test_a_command_is_carried_out_and_answered(client, governor):
    trimmed = ask(client, {"do": "trim", "fraction": 0.5})
    assert trimmed["error"] == ""
    assert trimmed["result"]["masked"] == governor.status().masked_cells > 0
    assert ask(client, {"do": "restore"})["result"]["cells"] == trimmed["result"]["masked"]
    assert ask(client, {"do": "park", "sequence": 0})["result"]["cells"] == 3000
    assert governor.status().resident_bytes == 0
    assert ask(client, {"do": "unpark"})["result"]["bytes_back"] == 3000 * CELL_BYTES
    assert ask(client, {"do": "limit", "n_bytes": 5000})["result"] is None
    assert governor.status().limit_bytes == 5000
    ask(client, {"do": "limit", "share": 0.5})
    assert governor.status().limit == 0.5
    ask(client, {"do": "limit"})
    assert governor.status().limit is None


@pytest.mark.parametrize(
    ("command", "told"),
    [
        ({"do": "explode"}, "explode"),
        ({"do": "trim", "fraction": 2.0}, "a fraction of 2.0 is not usable"),
        ({"do": "trim", "fraction": "much"}, "fraction"),
        ({"do": "trim", "cells": 5}, "cells"),
        ({"do": "limit", "share": 0.5, "n_bytes": 5}, "give one of them"),
        ({"psi_kv_command": 9, "do": "trim"}, "version 9 of the commands is not known here"),
        (b'{"do": "trim"}', "psi_kv_command"),
        (b"GET / HTTP/1.0", "no command"),
        (b"[" * 4000, "no command"),
        (b"", "no command"),
        (b"\xff\x00", "no command"),
    ],
    ids=str,
)
def test_what_is_no_command_gets_one_line_that_says_so_and_changes_nothing(client, governor, command, told):
    answer = ask(client, command)
    assert told in answer["error"]
    assert "\n" not in answer["error"]
    assert answer["result"] is None
    assert governor.status().live_cells == 3000
    assert ask(client, {"do": "restore"})["error"] == ""  # the connection is still good


def test_commands_sent_at_once_are_answered_in_their_order(client):
    lines = [{"psi_kv_command": 1, "do": do} for do in ("trim", "restore", "explode", "trim")]
    client.connection.sendall(b"".join(json.dumps(line).encode() + b"\n" for line in lines))
    answers: list[dict] = []
    while len(answers) < 4:
        line = client.next()
        answers += [line] if line.get("says") == "answer" else []
    assert [bool(answer["error"]) for answer in answers] == [False, False, True, False]
    assert answers[1]["result"]["bytes_back"] > 0


def test_a_command_waits_for_the_one_before_it(governor, client, monkeypatch):
    go_on = threading.Event()
    monkeypatch.setattr(governor, "trim", lambda fraction: (go_on.wait(30), Result(cells=17))[1])
    client.next()
    for do in (b"trim", b"restore"):  # two messages, as they are heard one by one
        client.connection.sendall(b'{"psi_kv_command": 1, "do": "%s"}\n' % do)
        assert [client.next()["says"] for _ in range(2)] == ["update"] * 2
    go_on.set()
    answers: list[dict] = []
    while len(answers) < 2:
        line = client.next()
        answers += [line] if line["says"] == "answer" else []
    assert [answer["result"]["cells"] for answer in answers] == [17, 0]


def test_while_a_command_takes_its_time_the_others_are_told_on(opened, governor, client, monkeypatch):
    go_on = threading.Event()
    monkeypatch.setattr(governor, "trim", lambda fraction: go_on.wait(10) and None)
    busy = Lines(opened.path)
    busy.next()
    busy.connection.sendall(b'{"psi_kv_command": 1, "do": "trim"}\n')
    client.next()
    for _ in range(3):
        assert client.next()["says"] == "update"
    go_on.set()
    while busy.next().get("says") != "answer":
        pass
    busy.close()


def test_an_engine_that_fails_is_told_to_who_asked(client, governor, monkeypatch):
    monkeypatch.setattr(governor, "trim", lambda fraction: 1 / 0)
    assert "ZeroDivisionError" in ask(client, {"do": "trim"})["error"]
    governor.engine.close()
    assert "closed" in ask(client, {"do": "restore"})["error"]


def test_with_nobody_connected_it_does_not_look_at_the_governor(opened, governor, monkeypatch):
    looked = []
    monkeypatch.setattr(governor, "status", lambda: looked.append(1))
    time.sleep(3 * status_server.UPDATE_S)
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
    engine = SimulatedEngine()
    made = Governor(engine, source=FakeSource())
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
