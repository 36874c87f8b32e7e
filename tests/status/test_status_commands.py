"""Commands to the status socket: carried out in their order, answered, and refused in a line."""

from __future__ import annotations

import json
import threading
import time

import pytest
from status_help import Lines, ask

from psi_kv_governor import socket_place, status_server
from psi_kv_governor.cache import Result
from psi_kv_governor.engines.simulated import CELL_BYTES
from waiting import PATIENCE_S

pytestmark = pytest.mark.skipif(not socket_place.able(), reason="this platform has no Unix sockets")


# -- commands ----------------------------------------------------------------------------------------------


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
    monkeypatch.setattr(governor, "trim", lambda fraction: (go_on.wait(PATIENCE_S), Result(cells=17))[1])
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
    monkeypatch.setattr(governor, "trim", lambda fraction: go_on.wait(PATIENCE_S) and None)
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
