"""Programs that start a server for each model (Ollama, the router of llama-server): one governor for all."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from servers import PSI_KV, Server, children_of, debian_program, free_port, resident_bytes
from servers import with_agent as environment

from packages_help import Unavailable
from psi_kv_governor.cache import SequenceState
from psi_kv_governor.engines.llama.fleet import Fleet
from psi_kv_governor.governor import Governor
from waiting import until

pytestmark = [pytest.mark.llama, pytest.mark.slow]

# The child protocol of Ollama (llm/llama_server.go, 2026): these arguments, the parent's environment with a
# library path of its own, both streams into one pipe, SIGTERM at the end.
OLLAMA = """
import os, signal, subprocess, sys, threading
exe, model, *ports = sys.argv[1:]
environ = {**os.environ, "LLAMA_MEDIA_MARKER": "<__media__>"}
libraries = [os.path.dirname(exe), *os.environ.get("LD_LIBRARY_PATH", "").split(":")]
environ["LD_LIBRARY_PATH"] = ":".join(filter(None, libraries))
children = []
for port in ports:
    flags = ["--no-webui", "--offline", "-c", "16384", "-np", "1", "--log-verbosity", "4", "--no-log-prefix"]
    flags += ["--no-log-timestamps", "--no-jinja", "--chat-template", "chatml", "--flash-attn", "auto"]
    flags += ["-b", "512", "-ub", "512", "-t", "1", "--context-shift"]
    words = [exe, "--model", model, "--port", port, "--host", "127.0.0.1", *flags]
    child = subprocess.Popen(words, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    threading.Thread(target=lambda out=child.stdout: [None for _ in out], daemon=True).start()
    children.append(child)
signal.signal(signal.SIGTERM, lambda *_: [child.terminate() for child in children])
for child in children: child.wait()
"""
PROMPT = "Once there was a fox. " + "The quick brown fox jumps over the lazy dog and goes home. " * 12


@pytest.fixture(scope="module")
def program() -> Path:
    try:
        return debian_program()
    except Unavailable as error:
        pytest.skip(f"Debian's llama-server can't be had here: {error}")


@contextlib.contextmanager
def governed(command: list[str], port: int, folder: Path, log: Path) -> Iterator[tuple[Server, Fleet]]:
    fleet = Fleet(place=str(folder), backing="file")
    environ = environment(fleet.name, folder, "file")
    with contextlib.closing(fleet), Server(command, port, environ, log=log) as server:
        yield server, fleet


def of_process(fleet: Fleet, pid: int) -> SequenceState:
    """The sequence that was used of the cache in that process."""
    caches = [cache for cache in fleet.snapshot().caches if cache.pid == pid]
    return max((one for cache in caches for one in cache.sequences), key=lambda one: one.last_used_s)


def _least_recently_used_goes_first(fleet: Fleet, ask: dict[int, Callable[[], object]]) -> None:
    """`ask` has each process answer the same; what is parked is the first's, and nothing of it is lost."""
    first, second = ask
    ask[first]()
    kept = ask[first]()
    ask[second]()
    until(lambda: not any(of_process(fleet, pid).running for pid in ask), "they are not idle")
    Governor(fleet).trim(0.4)
    assert of_process(fleet, first).parked_bytes > 0
    assert of_process(fleet, second).parked_bytes == 0
    assert ask[first]() == kept


def test_each_child_of_ollama_is_one_cache_and_the_least_recently_used_gives_first(
    program, shallow_model, folder, tmp_path
):
    ports = [free_port(), free_port()]
    command = [sys.executable, "-c", OLLAMA, str(program), str(shallow_model), *map(str, ports)]
    with governed(command, ports[0], folder, tmp_path / "log") as (server, fleet):
        until(lambda: len(fleet.pids) == 2, "not both came")
        assert set(fleet.pids) == set(children_of(server.pid))
        by_port = {_port_of(pid): pid for pid in fleet.pids}
        second = Server.__new__(Server)
        second.port = ports[1]
        until(lambda: _answers(second), "the second server does not answer")
        _least_recently_used_goes_first(
            fleet,
            {
                by_port[ports[0]]: lambda: server.complete(PROMPT),
                by_port[ports[1]]: lambda: second.complete(PROMPT),
            },
        )


def test_each_model_of_a_router_is_one_cache_and_the_least_recently_used_gives_first(
    program, shallow_model, folder, tmp_path
):
    models = tmp_path / "models"
    models.mkdir()
    for name in ("one", "two"):
        (models / f"{name}.gguf").symlink_to(shallow_model)
    port = free_port()
    flags = ["--models-dir", str(models), "--models-max", "2", "-c", "16384", "-t", "1", "--port", str(port)]
    with governed([str(program), *flags], port, folder, tmp_path / "log") as (server, fleet):

        def ask(name: str) -> object:
            body = {
                "model": name, "prompt": PROMPT, "n_predict": 8, "temperature": 0, "cache_prompt": True,
                "n_probs": 1,
            }  # fmt: skip
            told = server.post("/completion", body)
            return [(one["id"], one["logprob"]) for one in told["completion_probabilities"]]

        of_name: dict[str, int] = {}
        for name in ("one", "two"):
            ask(name)
            until(lambda: len(fleet.pids) > len(of_name), "no agent came")
            (of_name[name],) = set(fleet.pids) - set(of_name.values())
        assert set(fleet.pids) <= set(children_of(server.pid))
        _least_recently_used_goes_first(
            fleet, {of_name[name]: lambda name=name: ask(name) for name in of_name}
        )


def test_a_router_under_exec_is_small_and_leaves_nobody_behind(program, demo_model, folder, tmp_path):
    models = tmp_path / "models"
    models.mkdir()
    (models / "one.gguf").symlink_to(demo_model)
    port = free_port()
    flags = ["--models-dir", str(models), "-c", "32768", "-t", "1", "--port", str(port)]
    command = [*PSI_KV, "exec", "--place", str(folder), "--", str(program), *flags]
    with Server(command, port, log=tmp_path / "log") as server:
        told = server.post("/completion", {"model": "one", "prompt": PROMPT, "n_predict": 4})
        assert told["content"]
        (router,) = children_of(server.pid)
        (child,) = children_of(router)
        assert resident_bytes(child) < 300 << 20  # 850 MiB without us
    until(lambda: not Path(f"/proc/{child}").exists(), "the router's child is left")


def _port_of(pid: int) -> int:
    words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    return int(words[words.index(b"--port") + 1])


def _answers(server: Server) -> bool:
    try:
        return bool(server.get("/health"))
    except OSError:
        return False
