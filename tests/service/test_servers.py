"""Servers that somebody else wrote, governed as they are: memory, equality, and what happens when we go."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from servers import PSI_KV, Answer, Server, children_of, free_port, resident_bytes, with_agent

from psi_kv_governor.cache import Plan, Range, Snapshot, Step, Verb
from psi_kv_governor.engines.llama.fleet import Fleet
from psi_kv_governor.events import AnsweredMasked, Event
from psi_kv_governor.governor import Governor
from waiting import PATIENCE_S, until

pytestmark = [pytest.mark.llama, pytest.mark.slow]

MOST = 0.2
"""Of what the ungoverned server has resident."""
N_TALKS = 5
"""One more than there are slots: the oldest goes to the server's prompt cache."""
SENTENCES = 5
"""300 tokens, which are bytes: a server saves a state of them, and none of 190."""
TALKS = [
    f"Story number {i}. " + "The quick brown fox jumps over the lazy dog and goes home. " * SENTENCES
    for i in range(N_TALKS)
]


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


def idle(snapshot: Snapshot) -> bool:
    return all(not sequence.running for cache in snapshot.caches for sequence in cache.sequences)


@contextlib.contextmanager
def governed(command, place, backing, log, **options) -> Iterator[tuple[Server, Fleet]]:
    """A server with the agent in it; its sidecar is this process."""
    fleet = Fleet(place=str(place), backing=backing, **options)
    port = free_port()
    with (
        contextlib.closing(fleet),
        Server(command(port), port, with_agent(fleet.name, place, backing), log=log) as server,
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
        # Decoded anew, in other batches than without us: the same to the last bit only where it is read back.
        again = talk(server, " And then")
        assert [len(answer.logprobs) for answer in again] == [8] * N_TALKS
        assert min(answer.prompt_n for answer in again) > max(answer.prompt_n for answer in ungoverned.second)


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


def test_when_the_sidecar_is_killed_masks_are_taken_off_and_the_next_one_finds_the_program(
    xllamacpp, folder, tmp_path
):
    name = Fleet(place="", backing="memory")
    name.close()
    port = free_port()
    with Server(
        xllamacpp(port), port, with_agent(name.name, folder, "memory"), log=tmp_path / "log"
    ) as server:
        server.complete(TALKS[0])
        whole = server.complete(TALKS[0], 24)
        with subprocess.Popen(
            [sys.executable, "-c", MASKS, name.name, str(folder)], stdout=subprocess.PIPE, text=True
        ) as sidecar:
            assert int(sidecar.stdout.readline()) > 0
            answers: list[Answer] = []
            asking = threading.Thread(target=lambda: answers.append(server.complete(TALKS[0], 512)))
            asking.start()
            sidecar.kill()
        asking.join()
        assert len(answers[0].logprobs) == 512
        with contextlib.closing(Fleet(place=str(folder), backing="memory", name=name.name)) as fleet:
            until(lambda: bool(fleet.pids), "the agent did not come back")
            assert not any(s.masked for cache in fleet.snapshot().caches for s in cache.sequences)
            assert server.complete(TALKS[0], 24) == whole


def test_an_answer_that_was_given_with_cells_masked_is_told_of(xllamacpp, folder, tmp_path):
    events: list[Event] = []
    with governed(xllamacpp, folder, "memory", tmp_path / "log") as (server, fleet):
        server.complete(TALKS[0])
        until(lambda: idle(fleet.snapshot()), "the slot is not idle")
        (cache,) = [cache for cache in fleet.snapshot().caches if cache.sequences]
        slot = cache.sequences[0].id
        step = Step(verb=Verb.MASK, cache=cache.id, sequence=slot, ranges=(Range(32, 160),))
        assert fleet.apply(Plan(steps=(step,))).masked == 128
        governor = Governor(fleet)
        governor.subscribe(events.append)
        server.complete(TALKS[0], 6)
        governor.start()
        until(lambda: any(isinstance(event, AnsweredMasked) for event in events), "it was not told of")
        governor.close()
    (told,) = [event for event in events if isinstance(event, AnsweredMasked)]
    assert (told.pid, told.sequence, told.masked) == (server.pid, slot, 128)
    assert told.tokens >= 6


def _connections(name: str) -> int:
    """Sockets of this name: that of the listener, and one for each agent."""
    return len(re.findall(rf"@{name}$", Path("/proc/net/unix").read_text(), re.MULTILINE))


def test_exec_with_a_pid_governs_again_what_was_left(xllamacpp, folder, tmp_path, monkeypatch):
    port = free_port()
    command = [*PSI_KV, "exec", "--place", str(folder), "--", *xllamacpp(port)]
    with Server(command, port, log=tmp_path / "log") as server:
        (program,) = children_of(server.pid)
        server.complete(TALKS[0])  # what is decoded in one batch may differ in the last bit
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
                assert second.wait(PATIENCE_S) == 0
            assert server.complete(TALKS[0], 16).text == before.text
        finally:
            os.kill(program, signal.SIGKILL)
