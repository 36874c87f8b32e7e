"""`vllm serve` under `psi-kv exec`: /metrics has our figures beside its own, and the commands reach it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from psi_kv_governor import socket_place
from psi_kv_governor.engines.vllm.http import descendants
from vllm_scene import ENVIRON

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1300)]

BIN = Path(sys.executable).parent
START_S = 900
KEY = "a key of a user's"


class Server:
    """One that answers, and its engine's process."""

    def __init__(self, child: subprocess.Popen, port: int, log: Path) -> None:
        self.child, self.port, self.log = child, port, log
        self.engine = 0

    def ask(self, path: str, body: dict | None = None, key: str = KEY) -> str:
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}",
            data=None if body is None else json.dumps(body).encode(),
            headers={"Content-Type": "application/json", "Authorization": f"Bearer {key}"},
        )
        with urllib.request.urlopen(request, timeout=300) as answer:
            return answer.read().decode()

    def until_it_answers(self) -> None:
        end = time.monotonic() + START_S
        while True:
            assert self.child.poll() is None, self.log.read_text()[-3000:]
            assert time.monotonic() < end, self.log.read_text()[-3000:]
            with contextlib.suppress(OSError):
                self.ask("/health")
                break
            time.sleep(0.5)
        pids = descendants(self.child.pid)
        while not (found := [one.pid for one in socket_place.find() if one.pid in pids]):
            assert time.monotonic() < end, self.log.read_text()[-3000:]
            time.sleep(0.2)  # its governor begins with the first answers of the workers
        self.engine = found[0]

    def say(self, prompt: str) -> str:
        body = {"model": "small", "prompt": prompt, "max_tokens": 12, "temperature": 0, "ignore_eos": True}
        return json.loads(self.ask("/v1/completions", body))["choices"][0]["text"]

    def figure(self, name: str) -> float | None:
        """The sum of a metric over its labels; None where it is not there."""
        lines = [line for line in self.ask("/metrics").splitlines() if line.startswith(f"{name}{{")]
        return sum(float(line.rpartition(" ")[2]) for line in lines) if lines else None


@pytest.fixture(scope="module")
def server(served_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    words = [str(BIN / "psi-kv"), "exec", "--", str(BIN / "vllm"), "serve", str(served_model)]
    words += ["--served-model-name", "small", "--host", "127.0.0.1", "--port", str(port), "--enforce-eager"]
    words += ["--max-model-len", "1024", "--max-num-seqs", "4", "--dtype", "float32"]
    words += ["--api-key", KEY]
    environ = {**os.environ, **ENVIRON, "VLLM_LOGGING_LEVEL": "INFO", "VLLM_PLUGINS": "psi_kv_http"}
    log = tmp_path_factory.mktemp("served") / "log"
    with log.open("wb") as file:
        child = subprocess.Popen(words, stdout=file, stderr=subprocess.STDOUT, env=environ)
    try:
        made = Server(child, port, log)
        made.until_it_answers()
        yield made
    finally:
        child.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(60)
        child.kill()
        child.wait()


def psi_kv(*words: str) -> Any:
    ran = subprocess.run(
        [str(BIN / "psi-kv"), *words, "--json"], check=False, capture_output=True, text=True, timeout=120
    )
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout.splitlines()[0])


LONG = "The quick brown fox jumps over the lazy dog, and then it sleeps. " * 40
"""Some 600 tokens: four whole blocks of 128, which stay cached."""


def test_its_metrics_have_our_figures_beside_its_own(server):
    server.say(LONG)
    end = time.monotonic() + 120
    while not server.figure("psi_kv_vllm_resident_bytes"):  # told once a second, with a step
        assert time.monotonic() < end, server.ask("/metrics")
        server.say("One more")
    assert server.figure("vllm:num_requests_running") is not None
    assert server.figure("psi_kv_vllm_returned_bytes_total") is not None


def test_status_watch_limit_and_park_reach_it(server):
    said = server.say(LONG)
    pid = str(server.engine)
    status = psi_kv("status", pid)["status"]
    assert (status["name"], len(status["caches"])) == ("vllm", 1)
    assert psi_kv("watch", pid, "--once")["status"]["caches"][0]["resident_bytes"] > 1 << 20
    psi_kv("limit", pid, "64MiB")
    assert psi_kv("status", pid)["status"]["limit_bytes"] == 64 << 20
    psi_kv("limit", pid, "none")
    assert psi_kv("park", pid)["bytes_returned"] > 1 << 20
    assert server.say(LONG) == said
    end = time.monotonic() + 120
    while not server.figure("psi_kv_vllm_returned_bytes_total"):
        assert time.monotonic() < end, server.ask("/metrics")
        server.say("One more")


def test_its_own_http_has_status_and_limit_for_who_has_the_key(server):
    """`psi_kv_http` was named in VLLM_PLUGINS, and exec has named the connector's plugin beside it."""
    (engine,) = json.loads(server.ask("/v1/psi-kv/status"))["engines"]
    assert (engine["pid"], engine["status"]["name"]) == (server.engine, "vllm")
    server.ask("/v1/psi-kv/limit", {"n_bytes": 32 << 20})
    assert psi_kv("status", str(server.engine))["status"]["limit_bytes"] == 32 << 20
    server.ask("/v1/psi-kv/limit", {})
    for path, body in (("/v1/psi-kv/status", None), ("/v1/psi-kv/limit", {"n_bytes": 0})):
        with pytest.raises(urllib.error.HTTPError, match="401"):
            server.ask(path, body, key="none")
    with pytest.raises(urllib.error.HTTPError, match="400"):
        server.ask("/v1/psi-kv/limit", {"share": 2})
    (engine,) = json.loads(server.ask("/v1/psi-kv/status"))["engines"]
    assert engine["status"]["limit_bytes"] is None
