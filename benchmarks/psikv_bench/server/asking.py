"""Asks a server, and writes down what each answer took."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from psi_kv_governor.errors import BadInputError

SENTENCE = "The quick brown fox jumps over the lazy dog and goes home. "
SENTENCE_TOKENS = 13
KINDS = ("first", "return", "one-shot")
"""Of requests: the first turn of a conversation, a later one, a prompt that nobody comes back to."""
READY_S, ANSWER_S = 300.0, 600.0
SILENT: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
"""How a server is started."""


class Sample(msgspec.Struct):
    time_s: float
    usage_bytes: int


class Request(msgspec.Struct):
    """One prompt, and how long its first token took."""

    kind: str
    """One of `KINDS`."""
    number: int
    time_s: float
    first_token_s: float
    prompt_n: int
    """Tokens of the prompt that were decoded."""
    seconds: float


class Run(msgspec.Struct):
    """One server, from start to end or death."""

    governed: bool
    died: str = ""
    """What it was doing when it was killed; '' where it was not."""
    kills: int = 0
    peak_bytes: int = 0
    requests: list[Request] = []
    usage: list[Sample] = []

    def first_token_s(self, kind: str) -> float:
        """Median over the requests of that kind; NaN where there was none."""
        times = [one.first_token_s for one in self.requests if one.kind == kind]
        return statistics.median(times) if times else float("nan")


class Dead(Exception):
    """The server is gone."""


class Client:
    """Asks one server, and writes down what it takes."""

    def __init__(self, port: int, run: Run, begin_s: float) -> None:
        self.run = run
        self._port, self._begin_s = port, begin_s

    def ready(self, process: subprocess.Popen[bytes]) -> None:
        """Wait until it serves. Raises Dead."""
        deadline = time.monotonic() + READY_S
        while time.monotonic() < deadline:
            if process.poll() is not None:
                raise Dead("starting")
            with contextlib.suppress(OSError, http.client.HTTPException):
                connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=5)
                connection.request("GET", "/v1/models")
                if connection.getresponse().status == 200:
                    return
            time.sleep(0.1)
        raise Dead("starting (it did not answer)")

    def ask(self, kind: str, number: int, prompt: str) -> None:
        """One streamed completion. Raises Dead."""
        body = {"prompt": prompt, "n_predict": 8, "temperature": 0, "cache_prompt": True, "stream": True}
        begin_s = time.monotonic()
        try:
            connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=ANSWER_S)
            connection.request("POST", "/completion", json.dumps(body), {"content-type": "application/json"})
            first_s, told = None, {}
            for line in connection.getresponse():
                if line.startswith(b"data: {"):
                    first_s = first_s or time.monotonic()
                    told = json.loads(line[6:])
        except (OSError, http.client.HTTPException) as error:
            raise Dead(f"{kind} {number}") from error
        if first_s is None or "timings" not in told:
            raise Dead(f"{kind} {number}")
        now_s = time.monotonic()
        self.run.requests.append(
            Request(
                kind=kind, number=number, time_s=begin_s - self._begin_s, first_token_s=first_s - begin_s,
                prompt_n=told["timings"]["prompt_n"], seconds=now_s - begin_s,
            )
        )  # fmt: skip


def prompts(kind: str, number: int, tokens: int) -> str:
    """A text of some tokens that no other begins like."""
    return f"{kind} number {number}. " + SENTENCE * max(1, tokens // SENTENCE_TOKENS)


def command(words: Sequence[str], port: int, *, governed: bool, place: str) -> list[str]:
    """The server's, with its port, by itself or governed."""
    given = [word.replace("{port}", str(port)) for word in words]
    return [*sidecar(place), "--", *given] if governed else given


def sidecar(place: str) -> list[str]:
    """`psi-kv exec`, which parks in `place` where one is given."""
    where = ["--place", place] if place else []
    return [sys.executable, "-m", "psi_kv_governor.cli", "exec", *where]


def free_port() -> int:
    """One that nobody listens at."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def default_command(model: str) -> list[str]:
    """The server of `xllamacpp`, from the environment that the tests keep. Raises BadInputError."""
    from platformdirs import user_cache_path

    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    python = user_cache_path("psi-kv") / "test-servers" / f"python-{version}" / "bin" / "python"
    if not python.is_file():
        raise BadInputError(
            "no server here: run the tests of tests/service once, which fetch one, or give --server"
        )
    script = Path(__file__).parents[3] / "tests" / "service" / "xllamacpp_server.py"
    return [str(python), str(script), model, "{port}", "32768"]
