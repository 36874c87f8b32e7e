"""Our routes in vLLM's server, on a governed process; tests/vllm asks a real server."""

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fakes import FakeSource
from psi_kv_governor import socket_place
from psi_kv_governor.engines.simulated import SimulatedEngine
from psi_kv_governor.engines.vllm.http import PREFIX, HttpRoutes, descendants
from psi_kv_governor.governor import Governor
from psi_kv_governor.status_socket import StatusSocket

pytest.importorskip("starlette", reason="no starlette: pip install 'psi-kv-governor[dashboard]'")


@pytest.fixture
def governor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """In this process, as of a server whose engine runs in its own."""
    monkeypatch.setattr(socket_place, "folders", lambda: iter([tmp_path / "s"]))
    engine = SimulatedEngine()
    engine.add_cache(4096)
    engine.decode(3000)
    made = Governor(engine, source=FakeSource(0.0, tick_s=0.5), name="vllm")
    opened = StatusSocket(made)
    opened.start()
    yield made
    opened.close()
    made.close()


def asked(method: str, path: str, body: bytes = b"") -> tuple[int, dict]:
    """What an app with these routes answers, over ASGI as a server calls it."""
    from starlette.applications import Starlette

    app, sent = Starlette(), []
    HttpRoutes().attach_router(app)

    async def receive() -> dict:
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: dict) -> None:
        sent.append(message)

    scope = {"type": "http", "method": method, "path": path, "headers": [], "query_string": b""}
    asyncio.run(app({**scope, "root_path": "", "http_version": "1.1"}, receive, send))
    return sent[0]["status"], json.loads(sent[1]["body"])


def test_status_says_how_each_engine_of_the_server_stands(governor):
    code, told = asked("GET", f"{PREFIX}/status")
    assert (code, [one["pid"] for one in told["engines"]]) == (200, [os.getpid()])
    assert told["engines"][0]["status"]["name"] == "vllm"


def test_a_limit_is_set_and_lifted(governor):
    code, told = asked("POST", f"{PREFIX}/limit", b'{"n_bytes": 1048576}')
    assert (code, told) == (200, {"engines": [os.getpid()], "share": None, "n_bytes": 1048576})
    assert asked("GET", f"{PREFIX}/status")[1]["engines"][0]["status"]["limit_bytes"] == 1048576
    assert asked("POST", f"{PREFIX}/limit", b"{}")[0] == 200
    assert asked("GET", f"{PREFIX}/status")[1]["engines"][0]["status"]["limit_bytes"] is None


@pytest.mark.parametrize(
    "body", [b"", b"no json", b"[]", b'{"share": 2}', b'{"bytes": 5}', b'{"share": 0.5, "n_bytes": 5}']
)
def test_a_limit_that_is_none_is_refused_with_what_to_give(governor, body):
    code, told = asked("POST", f"{PREFIX}/limit", body)
    assert code == 400
    assert '{"n_bytes": 2147483648}' in told["error"]
    assert "\n" not in told["error"]


def test_a_server_without_a_governed_engine_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(socket_place, "folders", lambda: iter([tmp_path / "s"]))
    for method, path in (("GET", "status"), ("POST", "limit")):
        code, told = asked(method, f"{PREFIX}/{path}", b"{}")
        assert (code, told["error"]) == (503, "no governed engine of this server was found: its log says why")


def test_what_a_process_started_is_told_from_what_others_did():
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        assert {os.getpid(), child.pid} <= descendants(os.getpid())
        assert os.getpid() not in descendants(child.pid)
    finally:
        child.communicate(b"\n")
