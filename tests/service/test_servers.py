"""Servers that somebody else wrote, governed as they are: memory, equality, and what happens when we go."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from servers import PSI_KV, Answer, Server, children_of, free_port, resident_bytes

from psi_kv_governor.cache import Snapshot
from psi_kv_governor.engines.llama.fleet import Fleet
from psi_kv_governor.engines.llama.library import agent_path
from psi_kv_governor.governor import Governor

pytestmark = [pytest.mark.llama, pytest.mark.slow, pytest.mark.timeout(600)]

MOST = 0.2
"""Of what the ungoverned server has resident."""
N_TALKS = 5
"""One more than there are slots: the oldest goes to the server's prompt cache."""
SENTENCES = 30
"""390 tokens. The record is made with 1,500 (benchmarks/server.py)."""
TALKS = [
    f"Story number {i}. " + "The quick brown fox jumps over the lazy dog and goes home. " * SENTENCES
    for i in range(N_TALKS)
]
WAIT_S = 60


class Ungoverned(NamedTuple):
    at_start: int
    after: int
    first: list[Answer]
    second: list[Answer]


def talk(server: Server, further: str = "") -> list[Answer]:
    return [server.complete(text + further) for text in TALKS]


@pytest.fixture(scope="module")
def ungoverned(server_command, tmp_path_factory) -> Ungoverned:
    """The same server without us: its memory and its answers."""
    port = free_port()
    with Server(server_command(port), port, log=tmp_path_factory.mktemp("log") / "plain") as server:
        at_start = resident_bytes(server.pid)
        first = talk(server)
        return Ungoverned(at_start, resident_bytes(server.pid), first, talk(server, " And then"))


def with_agent(fleet: Fleet, place: Path | str, backing: str, agent: Path | None = None) -> dict[str, str]:
    return {
        **os.environ,
        "LD_PRELOAD": str(agent or agent_path()),
        "PSIKV_SOCKET": fleet.name,
        "PSIKV_PLACE": str(place),
        "PSIKV_BACKING": backing,
    }


def until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def idle(snapshot: Snapshot) -> bool:
    return all(not sequence.running for cache in snapshot.caches for sequence in cache.sequences)


@contextlib.contextmanager
def governed(command, place, backing, log, **options) -> Iterator[tuple[Server, Fleet]]:
    """A server with the agent in it; its sidecar is this process."""
    fleet = Fleet(place=str(place), backing=backing, **options)
    port = free_port()
    with (
        contextlib.closing(fleet),
        Server(command(port), port, with_agent(fleet, place, backing), log=log) as server,
    ):
        until(lambda: bool(fleet.pids), "no agent came")
        yield server, fleet


@pytest.mark.parametrize("backing", ["file", "memory"])
def test_a_server_stays_small_and_every_token_is_the_same(
    server_command, ungoverned, folder, tmp_path, backing
):
    with governed(server_command, folder, backing, tmp_path / "log") as (server, fleet):
        assert resident_bytes(server.pid) <= MOST * ungoverned.at_start
        assert talk(server) == ungoverned.first
        until(lambda: idle(fleet.snapshot()), "the slots are not idle")
        Governor(fleet).park()
        saved = [blob for cache in fleet.snapshot().caches for blob in cache.blobs]
        assert saved
        assert all(blob.parked for blob in saved)
        assert resident_bytes(server.pid) <= MOST * ungoverned.after
        again = talk(server, " And then")
    assert [answer.prompt_n for answer in again] == [answer.prompt_n for answer in ungoverned.second]
    assert again == ungoverned.second


def test_without_a_place_the_prompt_cache_is_refused_and_every_answer_is_given(
    server_command, ungoverned, tmp_path
):
    with governed(server_command, "", "memory", tmp_path / "log") as (server, fleet):
        fleet.refuse_blobs(True)
        assert talk(server) == ungoverned.first
        assert not [blob for cache in fleet.snapshot().caches for blob in cache.blobs]
        assert [answer.text for answer in talk(server, " And then")] == [
            answer.text for answer in ungoverned.second
        ]


# -- the sidecar is killed ------------------------------------------------------------------------------

MASKS = """
import sys, time
from psi_kv_governor.cache import Plan, Range, Step, Verb
from psi_kv_governor.engines.llama.fleet import Fleet
fleet = Fleet(place=sys.argv[2], backing="memory", name=sys.argv[1])
while not fleet.pids: time.sleep(0.05)
cache = next(cache for cache in fleet.snapshot().caches if cache.sequences)
step = Step(verb=Verb.MASK, cache=cache.id, sequence=cache.sequences[0].id, ranges=(Range(32, 160),))
print(fleet.apply(Plan(steps=(step,))).masked, flush=True)
time.sleep(1000)
"""


@pytest.fixture
def xllamacpp(python_of_servers, demo_model) -> Callable[[int], list[str]]:
    script = str(Path(__file__).with_name("xllamacpp_server.py"))
    return lambda port: [str(python_of_servers), script, str(demo_model), str(port), "4096"]


def test_when_the_sidecar_is_killed_masks_are_taken_off_and_the_next_one_finds_the_program(
    xllamacpp, folder, tmp_path
):
    name = Fleet(place="", backing="memory")
    name.close()
    port = free_port()
    with Server(xllamacpp(port), port, with_agent(name, folder, "memory"), log=tmp_path / "log") as server:
        server.complete(TALKS[0])
        whole = server.complete(TALKS[0], 24)
        with subprocess.Popen(
            [sys.executable, "-c", MASKS, name.name, str(folder)], stdout=subprocess.PIPE, text=True
        ) as sidecar:
            assert int(sidecar.stdout.readline()) > 0
            answers: list[Answer] = []
            asking = threading.Thread(target=lambda: answers.append(server.complete(TALKS[0], 64)))
            asking.start()
            sidecar.kill()
        asking.join()
        assert len(answers[0].logprobs) == 64
        with contextlib.closing(Fleet(place=str(folder), backing="memory", name=name.name)) as fleet:
            until(lambda: bool(fleet.pids), "the agent did not come back")
            assert not any(s.masked for cache in fleet.snapshot().caches for s in cache.sequences)
            assert server.complete(TALKS[0], 24) == whole


def _connections(name: str) -> int:
    """Sockets of this name: that of the listener, and one for each agent."""
    return len(re.findall(rf"@{name}$", Path("/proc/net/unix").read_text(), re.MULTILINE))


def test_exec_with_a_pid_governs_again_what_was_left(xllamacpp, folder, tmp_path, monkeypatch):
    port = free_port()
    command = [*PSI_KV, "exec", "--place", str(folder), "--", *xllamacpp(port)]
    with Server(command, port, log=tmp_path / "log") as server:
        (program,) = children_of(server.pid)
        before = server.complete(TALKS[0], 16)
        environ = Path(f"/proc/{program}/environ").read_bytes().decode()
        name = re.search(r"PSIKV_SOCKET=([^\0]+)", environ).group(1)
        server.process.kill()
        server.process.wait()
        try:
            assert _connections(name) == 0
            attach = [*PSI_KV, "exec", "--pid", str(program)]
            with subprocess.Popen(attach, stderr=subprocess.PIPE, text=True) as second:
                until(lambda: _connections(name) == 2, "no agent came")
                third = subprocess.run(attach, capture_output=True, text=True, check=False)
                assert third.returncode == 2
                assert "has its governor already" in third.stderr
                second.send_signal(signal.SIGTERM)
                assert second.wait(WAIT_S) == 0
            assert server.complete(TALKS[0], 16).text == before.text
        finally:
            os.kill(program, signal.SIGKILL)


def test_exec_with_a_pid_says_so_where_there_is_no_agent():
    with subprocess.Popen(["sleep", "100"]) as other:
        done = subprocess.run(
            [*PSI_KV, "exec", "--pid", str(other.pid)], capture_output=True, text=True, check=False
        )
        other.kill()
    assert done.returncode == 2
    assert "was not started by psi-kv exec" in done.stderr
    assert len(done.stderr.splitlines()) == 1


# -- programs that start programs, and Python -----------------------------------------------------------

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
        Server(command, ports[0], with_agent(fleet, folder, "file"), log=tmp_path / "log") as server,
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


APP = """
import sys
from llama_cpp import Llama
llm = Llama(sys.argv[1], n_ctx=32768, n_threads=1, verbose=False, flash_attn=True)
rss = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmRSS"))
print(rss, llm("The quick brown fox", max_tokens=8, temperature=0)["choices"][0]["text"])
"""


def _app(*before: str, demo_model: Path, **options) -> tuple[int, str, str]:
    command = [*before, sys.executable, "-c", APP, str(demo_model)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=WAIT_S * 3, **options)
    rss, _, text = done.stdout.partition(" ")
    return int(rss), text, done.stderr


def test_a_llama_in_a_python_program_is_governed_under_exec(demo_model, folder):
    rss, text, _ = _app(demo_model=demo_model)
    small, same, said = _app(*PSI_KV, "exec", "--place", str(folder), "--", demo_model=demo_model)
    assert same == text
    assert small <= 0.4 * rss  # its compute buffer is larger than a server's
    assert "psi-kv:" not in said


def test_with_an_agent_of_another_version_the_program_runs_on_and_that_is_said_once(
    demo_model, folder, compiled, tmp_path
):
    source = Path(str(agent_path.__globals__["_SOURCE_DIR"]))
    other = tmp_path / "agent"
    other.mkdir()
    for part in source.glob("*.[ch]"):
        (other / part.name).write_text(
            part.read_text().replace("enum { VERSION = 1 };", "enum { VERSION = 99 };")
        )
    flags = ("-std=gnu11", "-O2", "-shared", "-fPIC", "-fvisibility=hidden", "-fexceptions", "-x", "none")
    library = compiled("other.so", "", *flags, *map(str, other.glob("*.c")), "-ldl", "-lm", "-lpthread")
    refused: list[tuple[int, str]] = []
    fleet = Fleet(place=str(folder), backing="file", refused=lambda pid, why: refused.append((pid, why)))
    with contextlib.closing(fleet):
        _, text, _ = _app(demo_model=demo_model, env=with_agent(fleet, folder, "file", library))
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
            [sys.executable, "-c", script], env=with_agent(fleet, folder, "memory"),
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
