"""Evicting by the front doors: `GovernedLlama`, and a program over the socket."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys

import pytest
from evict_help import CELL_BYTES, CONFIG

from fakes import FakeSource
from gguf_models import LARGE
from psi_kv_governor import GovernedLlama
from psi_kv_governor.engines.llama.fleet import Fleet
from psi_kv_governor.events import AnsweredMasked, Trimmed
from psi_kv_governor.governor import Governor
from psi_kv_governor.native import building
from waiting import until

pytestmark = pytest.mark.llama


def test_a_governed_llama_says_what_it_lost_and_heals(tiny_model):
    events = []
    settings = {"n_ctx": 2048, "n_threads": 1, "n_threads_batch": 1, "verbose": False, "flash_attn": True}
    llm = GovernedLlama(str(tiny_model(LARGE)), config=CONFIG, auto=False, source=FakeSource(), **settings)
    with contextlib.closing(llm):
        llm.governor.subscribe(events.append)
        prompt = "the cat sat on the mat " * 40
        first = llm(prompt, max_tokens=4, temperature=0)
        assert "psi_kv" not in first
        result = llm.governor.trim(0.5)
        assert result.lost > 100
        assert result.problem == ""
        assert [event.lost for event in events if isinstance(event, Trimmed)] == [result.lost]
        status = llm.governor.status()
        assert (status.lost_cells, status.masked_cells) == (result.lost, 0)
        said = llm(prompt + "and", max_tokens=4, temperature=0)["psi_kv"]
        assert said["lost_tokens"] == result.lost
        assert said["affected_tokens"] > 0
        assert llm.governor.restore().bytes_back == 0  # nothing of it is anywhere
        assert llm.governor.heal() > result.lost
        assert llm.governor.status().lost_cells == 0
        assert "psi_kv" not in llm(prompt, max_tokens=4, temperature=0)


PROGRAM = """
import sys
import llama_cpp
llm = llama_cpp.Llama(sys.argv[1], n_ctx=2048, n_threads=1, n_threads_batch=1, verbose=False, flash_attn=True)
llm.eval([i % 240 + 5 for i in range(1000)])
print("ready", flush=True)
for line in sys.stdin:
    llm.eval([int(word) for word in line.split()])
    print(llm.n_tokens, flush=True)
"""


def test_over_the_socket_it_is_the_same(tiny_model):
    events = []
    fleet = Fleet(place="", backing="memory")
    environ = {**os.environ, "LD_PRELOAD": str(building.agent_path()), "PSIKV_SOCKET": fleet.name}
    command = [sys.executable, "-c", PROGRAM, str(tiny_model(LARGE))]
    with (
        contextlib.closing(fleet),
        subprocess.Popen(
            command, env=environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as program,
    ):
        assert program.stdin is not None
        assert program.stdout is not None
        assert program.stdout.readline() == "ready\n"
        until(lambda: fleet.snapshot().caches, "its agent did not connect")  # in a thread of its own
        governor = Governor(fleet, config=CONFIG, source=FakeSource())
        with contextlib.closing(governor):
            governor.subscribe(events.append)
            result = governor.trim(0.5)
            assert result.lost > 100
            assert result.bytes_returned >= 0.8 * result.lost * CELL_BYTES
            assert not fleet.describe().capabilities.park.able
            assert fleet.describe().capabilities.evict.able
            program.stdin.write("7 8 9\n")
            program.stdin.flush()
            assert program.stdout.readline() == "1003\n"
            (one,) = (one for cache in fleet.snapshot().caches for one in cache.sequences)
            assert (one.lost_cells, one.affected, one.next_position) == (result.lost, 3, 1003)
            until(lambda: governor.step() and any(isinstance(event, AnsweredMasked) for event in events))
            program.stdin.close()
        assert program.wait() == 0
    answered = next(event for event in events if isinstance(event, AnsweredMasked))
    assert (answered.tokens, answered.masked) == (3, result.lost)
