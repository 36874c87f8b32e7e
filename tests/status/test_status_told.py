"""The status socket: its owner sees how things stand, nobody else does, and the governor never waits."""

from __future__ import annotations

import json
import os
import socket
import time
from itertools import pairwise

import pytest
from status_help import Lines

from psi_kv_governor import socket_place, status_messages, status_server
from psi_kv_governor.status_socket import StatusSocket
from waiting import PATIENCE_S, until

pytestmark = pytest.mark.skipif(not socket_place.able(), reason="this platform has no Unix sockets")


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
    events = []
    while len(events) < 3:  # an update may be made in the middle of the step
        update = client.next()
        events += [event["event"] for event in update["events"]]
    assert update["status"]["masked_cells"] > 0
    assert events == ["CacheOpened", "ModeChanged", "Trimmed"]


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
    times_s = [client.next()["time_s"] for _ in range(4)]
    # A busy machine may hold them up.
    assert all(after - before >= status_server.UPDATE_S for before, after in pairwise(times_s))
    assert status_server.UPDATE_S == 0.2


# -- who is told -------------------------------------------------------------------------------------------


def test_folder_and_socket_are_the_owners_alone(opened):
    assert opened.path.parent.stat().st_mode & 0o777 == 0o700
    assert opened.path.stat().st_mode & 0o777 == 0o600
    assert opened.path.name.startswith(f"{os.getpid()}-")


@pytest.mark.skipif(not hasattr(socket, "SO_PEERCRED"), reason="this kernel does not tell who connects")
def test_another_user_is_told_nothing(client, opened, monkeypatch):
    assert client.next()
    monkeypatch.setattr(socket_place, "same_user", lambda connection: False)
    stranger = socket_place.connect(opened.path, PATIENCE_S)
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
    late = socket_place.connect(opened.path, PATIENCE_S)
    assert late.recv(100) == b""
    for one in (late, *more):
        one.close()


# -- clients that misbehave --------------------------------------------------------------------------------


def test_a_client_that_does_not_read_holds_up_nobody(opened, client, monkeypatch):
    monkeypatch.setattr(status_server, "UPDATE_S", 0.001)
    monkeypatch.setattr(status_server, "STUCK_S", PATIENCE_S)  # a busy machine needs some seconds for them
    deaf = socket_place.connect(opened.path)
    client.next()
    for _ in range(1000):  # more than a socket's buffer
        assert client.next()
    assert len(opened._server._clients) == 2
    # Else the other one, where this thread has to wait for a processor, would be let go as well.
    monkeypatch.setattr(status_server, "UPDATE_S", 0.05)
    monkeypatch.setattr(status_server, "STUCK_S", 1.0)
    until(lambda: client.next() and len(opened._server._clients) == 1)
    deaf.close()


def test_a_slow_client_gets_whole_lines_and_every_event(opened, governor, monkeypatch):
    monkeypatch.setattr(status_server, "UPDATE_S", 0.002)
    monkeypatch.setattr(status_server, "STUCK_S", PATIENCE_S)
    slow = socket_place.connect(opened.path)
    slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    time.sleep(1.0)
    governor._sensor.source.stall = 0.6
    governor.step()
    slow.settimeout(PATIENCE_S)
    file = slow.makefile("rb")
    events = []
    while len(events) < 3:
        events += json.loads(file.readline()).get("events", [])
    assert [event["event"] for event in events] == ["CacheOpened", "ModeChanged", "Trimmed"]
    file.close()
    slow.close()


def test_a_client_that_hangs_up_or_talks_without_an_end_is_let_go(opened, client):
    client.next()
    talker, hasty = Lines(opened.path), Lines(opened.path)
    talker.next()
    hasty.close()
    talker.connection.send(b"x" * (status_server.MOST_COMMAND_BYTES + 1))
    until(lambda: client.next() and len(opened._server._clients) == 1)
    talker.close()
