"""Programs that start servers, and Python programs, under `psi-kv exec`."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from servers import PSI_KV, Server, children_of, free_port, resident_bytes, sees_a_cache, with_agent

from psi_kv_governor import Governor
from psi_kv_governor.engines.llama.fleet import Fleet
from psi_kv_governor.native.building import agent_path
from waiting import PATIENCE_S, until

pytestmark = [pytest.mark.llama, pytest.mark.slow]

# As Ollama does: one server a model, each with the parent's environment and a search path of its own.
PARENT = """
import os, subprocess, sys, signal
environ = {**os.environ, "LD_LIBRARY_PATH": "/usr/lib/ollama", "OLLAMA_LIBRARY_PATH": "/usr/lib/ollama"}
children = [subprocess.Popen(sys.argv[1].format(port=port).split("|"), env=environ) for port in sys.argv[2:]]
signal.signal(signal.SIGTERM, lambda *_: [child.terminate() for child in children])
for child in children: child.wait()
"""


def test_each_server_that_a_parent_starts_is_one_cache_of_the_same_governor(xllamacpp, folder, tmp_path):
    fleet = Fleet(place=str(folder), backing="file")
    ports = [free_port(), free_port()]
    words = "|".join(xllamacpp(0)).replace("|0|", "|{port}|")
    command = [sys.executable, "-c", PARENT, words, *map(str, ports)]
    with (
        contextlib.closing(fleet),
        Server(command, ports[0], with_agent(fleet.name, folder, "file"), log=tmp_path / "log") as server,
    ):
        until(lambda: len(fleet.pids) == 2, "not both came")
        assert set(fleet.pids) == set(children_of(server.pid))
        until(lambda: len(fleet.snapshot().caches) >= 2, "no caches")
        caches = fleet.snapshot().caches
        assert len({cache.id for cache in caches}) == len(caches)
        os.kill(fleet.pids[1], signal.SIGKILL)
        until(
            lambda: {cache.pid for cache in fleet.snapshot().caches} == {fleet.pids[0]},
            "the dead one is still told",
        )


HOLDS = """
import sys
from llama_cpp import Llama
llm = Llama(sys.argv[1], n_ctx=2048, n_threads=1, verbose=False, flash_attn=True)
llm.eval(list(range(100, 400)))
if sys.argv[2] == "closed":
    llm.close()
print("ready", flush=True)
sys.stdin.readline()
"""


def test_a_process_that_holds_no_cache_any_more_keeps_nobody_else_from_giving_memory_back(
    shallow_model, folder
):
    fleet = Fleet(place=str(folder), backing="memory")
    with contextlib.ExitStack() as ending:
        ending.enter_context(contextlib.closing(fleet))
        for what in ("closed", "open"):
            program = subprocess.Popen(
                [sys.executable, "-c", HOLDS, str(shallow_model), what],
                env=with_agent(fleet.name, folder, "memory"),
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            )  # fmt: skip
            ending.callback(program.communicate, "\n")
            assert program.stdout.readline() == "ready\n"
        until(lambda: len(fleet.pids) == 2 and len(fleet.snapshot().caches) == 1, "not both came")
        able = fleet.describe().capabilities
        assert able.park.able
        assert able.mask.able
        until(
            lambda: not any(one.running for one in fleet.snapshot().caches[0].sequences),
            "it is still being decoded",
        )
        assert Governor(fleet).park().bytes_returned > 1 << 18


APP = """
import sys
from llama_cpp import Llama
llm = Llama(sys.argv[1], n_ctx=32768, n_threads=1, verbose=False, flash_attn=True)
rss = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmRSS"))
print(rss, llm("The quick brown fox", max_tokens=8, temperature=0)["choices"][0]["text"], flush=True)
sys.stdin.readline()
"""


def _app(
    *before: str, demo_model: Path, seen: Callable[[int], object] = bool, **options
) -> tuple[int, str, str]:
    """It ends when it was `seen`: of so short a program its sidecar may else not hear in time."""
    command = [*before, sys.executable, "-c", APP, str(demo_model)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, **options) as program:
        until(lambda: program.poll() is not None or seen(program.pid), "it was not seen")
        out, said = program.communicate("\n", timeout=2 * PATIENCE_S)
    assert program.returncode == 0, said
    rss, _, text = out.partition(" ")
    return int(rss), text, said


def test_a_llama_in_a_python_program_is_governed_under_exec(demo_model, folder):
    rss, text, _ = _app(demo_model=demo_model)
    command = (*PSI_KV, "exec", "--place", str(folder), "--")
    small, same, said = _app(*command, demo_model=demo_model, seen=sees_a_cache)
    assert same == text
    assert small <= 0.4 * rss  # its compute buffer is larger than a server's
    assert "psi-kv:" not in said


def test_with_an_agent_of_another_version_the_program_runs_on_and_that_is_said_once(
    demo_model, folder, compiled, tmp_path
):
    source = Path(str(agent_path.__globals__["SOURCE_DIR"]))
    other = tmp_path / "agent"
    other.mkdir()
    for part in source.glob("*.[ch]"):
        (other / part.name).write_text(
            part.read_text().replace("enum { VERSION = 1 };", "enum { VERSION = 99 };")
        )
    flags = ("-std=gnu11", "-O0", "-shared", "-fPIC", "-fvisibility=hidden", "-fexceptions", "-x", "none")
    library = compiled("other.so", "", *flags, *map(str, other.glob("*.c")), "-ldl", "-lm", "-lpthread")
    refused: list[tuple[int, str]] = []
    fleet = Fleet(place=str(folder), backing="file", refused=lambda pid, why: refused.append((pid, why)))
    with contextlib.closing(fleet):
        environ = with_agent(fleet.name, folder, "file", library)
        _, text, _ = _app(demo_model=demo_model, env=environ, seen=lambda pid: refused)
        assert text == _app(demo_model=demo_model)[1]
        assert not fleet.pids
    assert [why for _, why in refused] == [
        "its agent is of another version than this psi-kv: start the program again"
    ]


def test_the_server_of_llama_cpp_python_is_governed_under_exec(
    python_of_servers, demo_model, folder, tmp_path
):
    def answer(*before: str) -> tuple[int, str]:
        port = free_port()
        flags = ("--model", str(demo_model), "--n_ctx", "32768", "--n_threads", "1", "--flash_attn", "true")
        command = [*before, str(python_of_servers), "-m", "llama_cpp.server", *flags, "--port", str(port)]
        with Server(command, port, log=tmp_path / "log") as server:
            pid = children_of(server.pid)[0] if before else server.pid
            body = {"prompt": "The quick brown fox", "max_tokens": 8, "temperature": 0}
            return resident_bytes(pid), server.post("/v1/completions", body)["choices"][0]["text"]

    rss, text = answer()
    small, same = answer(*PSI_KV, "exec", "--place", str(folder), "--")
    assert same == text
    assert small <= 0.4 * rss


def test_a_program_that_ends_while_a_child_of_it_lives_keeps_nobody_waiting(demo_model, folder):
    """The child has the socket of the agent as well, and never answers."""
    script = f"""
import os, sys, time
from llama_cpp import Llama
llm = Llama({str(demo_model)!r}, n_ctx=2048, n_threads=1, verbose=False)
sys.stdin.readline()
child = os.fork()
if child == 0:
    os.close(0); os.close(1); time.sleep(600)
print(child, flush=True)
os._exit(0)
"""
    fleet = Fleet(place=str(folder), backing="memory")
    with contextlib.closing(fleet):
        program = subprocess.Popen(
            [sys.executable, "-c", script], env=with_agent(fleet.name, folder, "memory"),
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        until(lambda: bool(fleet.pids), "no agent came")
        child = int(program.communicate("\n")[0])
        try:
            begin_s = time.monotonic()
            fleet.snapshot()
            assert time.monotonic() - begin_s < 20
            assert not fleet.pids
        finally:
            os.kill(child, signal.SIGKILL)
