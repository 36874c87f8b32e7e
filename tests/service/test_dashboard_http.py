"""Who gets in at the dashboard, and what is answered: without a browser."""

from __future__ import annotations

import http.client
import json
import os
import socket
import threading
from functools import partial
from urllib.parse import parse_qs, urlsplit

import pytest

from psi_kv_governor import socket_place
from psi_kv_governor.cache import CacheState, Range, SequenceState
from psi_kv_governor.commands import Answer
from psi_kv_governor.errors import PsiKvError
from psi_kv_governor.service.address import Address
from psi_kv_governor.service.dashboard import DashboardServer, Governed, Watched
from psi_kv_governor.service.dashboard.view import blocks_of
from psi_kv_governor.status_client import ask as ask_by_socket
from psi_kv_governor.status_client import messages
from psi_kv_governor.status_socket import StatusSocket
from waiting import PATIENCE_S, until

ANY = Address("127.0.0.1", 0)


@pytest.fixture
def server(governor, patient_end):
    made = DashboardServer(Governed(governor), ANY)
    yield made
    made.close()


def token(server: DashboardServer) -> str:
    return parse_qs(urlsplit(server.url).query)["token"][0]


def ask(server, path="/", *, method="GET", body=None, key=None, **headers) -> tuple[int, str, dict]:
    connection = http.client.HTTPConnection("127.0.0.1", server.address.port, timeout=PATIENCE_S)
    if key is not None:
        headers["Cookie"] = f"psikv_{server.address.port}={key}"
    connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
    answer = connection.getresponse()
    return answer.status, answer.read().decode(), dict(answer.getheaders())


def command(server, body: object, **headers) -> tuple[int, str]:
    text = body if isinstance(body, str) else json.dumps(body)
    origin = headers.pop("Origin", f"http://127.0.0.1:{server.address.port}")
    return ask(server, "/command", method="POST", body=text, key=token(server), Origin=origin, **headers)[:2]


def views(server, n: int) -> list[tuple[str, object]]:
    """The first `n` messages of the stream: event and data."""
    found: list[tuple[str, object]] = []
    look(server, n, found)
    return found


def look(server, n: int, found: list[tuple[str, object]]) -> None:
    """Put them into `found`, each as it comes."""
    connection = http.client.HTTPConnection("127.0.0.1", server.address.port, timeout=PATIENCE_S)
    connection.request("GET", "/live", headers={"Cookie": f"psikv_{server.address.port}={token(server)}"})
    answer = connection.getresponse()
    assert answer.getheader("content-type").startswith("text/event-stream")
    event = "message"
    while len(found) < n and (line := answer.readline()):
        if line.startswith(b"event: "):
            event = line[7:].strip().decode()
        elif line.startswith(b"data: "):
            found.append((event, json.loads(line[6:].strip() or b"null")))
            event = "message"
    connection.close()


def test_the_printed_address_opens_the_page_and_takes_the_token_out_of_sight(server):
    status, _, headers = ask(server, f"/?token={token(server)}")
    assert (status, headers["location"]) == (303, "/")
    assert "HttpOnly" in headers["set-cookie"]
    assert "SameSite=strict" in headers["set-cookie"]
    status, page, headers = ask(server, key=token(server))
    assert status == 200
    assert "<h1>" in page
    assert headers["cache-control"] == "no-store"
    assert "default-src 'self'" in headers["content-security-policy"]


@pytest.mark.parametrize("path", ["/", "/style.css", "/board.js", "/live", "/command", "/?token=wrong"])
def test_without_the_token_nobody_gets_in_and_one_line_says_what_to_do(server, path):
    for key in (None, "wrong", "é"):
        status, said, headers = ask(
            server, path, method="POST" if path == "/command" else "GET", key=key and "x"
        )
        assert status == 403
        assert said == "wrong token: open the address that psi-kv printed when it was started\n"
        assert "set-cookie" not in headers


def test_the_page_of_another_site_or_port_can_ask_for_nothing(server, governor):
    for origin in ("http://127.0.0.1:1", "https://evil.example", "null"):
        assert command(server, {"do": "limit", "share": 0.0}, Origin=origin)[0] == 403
    assert governor.status().limit is None
    assert ask(server, key=token(server), Host="evil.example")[0] == 400


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("", "truncated"),
        ("[]", "object"),
        ('{"do": "explode"}', "explode"),
        ('{"do": "limit", "share": "all"}', "float"),
        ('{"do": "limit", "share": 0.5, "who": 1}', "unknown field"),
        ("x" * 2000, "no command"),
    ],
)
def test_what_is_no_command_is_refused_in_one_line(server, body, said):
    status, answer = command(server, body)
    assert status == 400
    assert said in answer
    assert "\n" not in answer


def test_commands_reach_the_governor(server, governor):
    assert command(server, {"do": "park"})[0] == 200
    parked = governor.status().parked_bytes
    assert parked > 0
    status, said = command(server, {"do": "unpark"})
    assert (status, "back in memory" in said) == (200, True)
    assert governor.status().parked_bytes == 0
    assert command(server, {"do": "limit", "share": 0.25})[0] == 200
    assert governor.status().limit == 0.25
    assert command(server, {"do": "limit", "share": 2})[0] == 409
    assert command(server, {"do": "limit"})[0] == 200
    assert governor.status().limit is None


def test_the_stream_says_how_it_stands_and_what_happened_before(server, governor):
    governor.step()
    governor.park()
    (start, _), (kind, view) = views(server, 2)
    assert (start, kind) == ("start", "message")
    assert view["name"] == "llama-server"
    assert [event[1] for event in view["events"]] == ["opened", "trimmed"]
    assert view["caches"][0]["strips"][1]["blocks"] == [["parked", 1000], ["free", 3096]]


def test_two_dashboards_know_two_tokens(server, governor):
    other = DashboardServer(Governed(governor), ANY)
    try:
        assert token(other) != token(server)
        assert ask(other, key=token(server))[0] == 403
        assert ask(other, key=token(other))[0] == 200
    finally:
        other.close()
    assert ask(server, key=token(server))[0] == 200


def test_a_port_in_use_is_an_error_and_leaves_nothing_behind(governor):
    before = set(threading.enumerate())  # one of an earlier test may be about to end
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(OSError, match="in use"):
        DashboardServer(Governed(governor), Address("127.0.0.1", taken.getsockname()[1]))
    assert not set(threading.enumerate()) - before


def test_who_looks_is_told_when_it_ends(server):
    got: list = []
    reader = threading.Thread(target=look, args=(server, 1000, got))
    reader.start()
    until(lambda: got)  # who is connected, and was not heard yet, is only cut off
    server.close()
    reader.join(PATIENCE_S)
    assert got[-1] == ("gone", "the program has ended")


def test_another_process_is_looked_at_through_its_status_socket(governor, patient_end, tmp_path, monkeypatch):
    monkeypatch.setattr(socket_place, "folders", lambda: iter([tmp_path / "s"]))
    opened = StatusSocket(governor)
    opened.start()
    with socket_place.connect(opened.path, PATIENCE_S) as connection:
        found = socket_place.Found(os.getpid(), opened.path)
        watched = Watched(messages(connection), partial(ask_by_socket, found))
        server = DashboardServer(watched, ANY)
        try:
            view = views(server, 2)[1][1]
            assert view["name"] == "llama-server"
            assert command(server, {"do": "park"}) == (200, "22 MiB returned")
            opened.close()
            until(lambda: watched._why_gone)
            assert views(server, 2)[-1] == ("gone", "the process has ended, or closed its model")
        finally:
            server.close()


def test_a_process_that_says_nothing_is_an_error():
    with pytest.raises(PsiKvError, match="has ended"):
        Watched(iter([]), lambda command: Answer())


def test_blocks_lie_where_their_positions_are():
    one = SequenceState(
        id=0,
        next_position=90,
        live=(Range(0, 10), Range(20, 50)),
        masked=(Range(10, 20),),
        lost=(Range(60, 90),),
        parked_bytes=15 * 8,
    )
    cache = CacheState(id=1, name="a", pid=1, capacity_cells=100, cell_bytes=8, row_bytes=8, resident_bytes=0,
                       maskable=True)  # fmt: skip
    assert blocks_of(one, cache) == [
        ("parked", 10), ("masked", 10), ("parked", 5), ("live", 25), ("free", 10), ("lost", 30), ("free", 10),
    ]  # fmt: skip
