"""A disk or a file system that can't do what it is asked for: nothing is lost, and it is said why."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from gguf_models import LARGE
from psi_kv_governor.native import building

pytestmark = pytest.mark.llama

OPENING = """
import ctypes, os, sys
from psi_kv_governor.engines.llama import loader
agent = loader.load().agent
path, place, backing, failing = sys.argv[1:]
agent.configure(place, in_file=backing == "file", reserve_bytes=0, limit_bytes=0)
import llama_cpp
from psi_kv_governor.engines.llama.client import Client, InProcess, Op
client = Client(InProcess(agent.serve))

def open_llm():
    small = {"n_ctx": 4096, "n_threads": 1, "n_threads_batch": 1, "verbose": False}
    return llama_cpp.Llama(path, flash_attn=True, **small)

def state(llm):
    size = llama_cpp.llama_state_get_size(llm.ctx)
    buffer = (ctypes.c_uint8 * size)()
    return bytes(buffer)[: llama_cpp.llama_state_get_data(llm.ctx, buffer, size)]

tokens = [i % 240 + 5 for i in range(1500)]
"""

FROM_THE_START = """
os.environ["PSIKV_TEST_FAILS"] = failing
llm = open_llm()
(region,) = client.regions(count_resident=True)
llm.eval(tokens)
whole = state(llm)
reply = client.ask(Op.PARK, region.id, 0)
returned = reply.n_bytes
assert state(llm) == whole
llm.n_tokens = 100
llm.eval(tokens[:1])
short = state(llm)
released = client.ask(Op.RELEASE, region.id, -1).n_bytes
assert state(llm) == short
leftover = [name for name in os.listdir(place)]
parked, gone = returned > 1400 * region.cell_bytes, released > 1300 * region.cell_bytes
print(region.in_file, parked, gone, leftover, reply.problem)
"""

FROM_THE_MIDDLE = """
llm, twin = open_llm(), open_llm()
region = client.regions(count_resident=True)[0]
for one in (llm, twin):
    one.eval(tokens)
whole = state(twin)
os.environ["PSIKV_TEST_FAILS"] = failing
reply = client.ask(Op.PARK, region.id, 0)
assert reply.n_bytes == 0 and reply.problem, reply
assert state(llm) == whole
del os.environ["PSIKV_TEST_FAILS"]
again = client.ask(Op.PARK, region.id, 0)
assert state(llm) == whole
for one in (llm, twin):
    one.eval(tokens[:300])
assert state(llm) == state(twin)
print(again.n_bytes > 0, reply.problem)
"""


@pytest.fixture(scope="session")
def failing_disk(tmp_path_factory) -> Path:
    """A library that makes calls fail."""
    built = tmp_path_factory.mktemp("failing") / "failing.so"
    source = Path(__file__).with_name("failing_disk.c")
    words = [building.compiler(), "-shared", "-fPIC", "-O1", str(source), "-o", str(built), "-ldl"]
    subprocess.run(words, check=True, timeout=800)
    return built


@pytest.fixture
def run(failing_disk, tiny_model, folder):
    def run_(script: str, backing: str, failing: str) -> str:
        place = folder / "place"
        place.mkdir(exist_ok=True)
        done = subprocess.run(
            [sys.executable, "-c", OPENING + script, str(tiny_model(LARGE)), str(place), backing, failing],
            env={**os.environ, "LD_PRELOAD": str(failing_disk)},
            capture_output=True,
            text=True,
            timeout=800,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout.strip()

    return run_


@pytest.mark.parametrize("backing", ["file", "memory"])
@pytest.mark.parametrize("lacking", ["O_TMPFILE", "O_DIRECT", "hole"])
def test_a_file_system_that_can_do_less_does_what_it_can(run, backing, lacking):
    """Files without a name, past the page cache, with holes: none of it is needed."""
    assert run(FROM_THE_START, backing, lacking) == f"{backing == 'file'} True True []"


def test_where_a_file_can_not_be_allocated_whole_the_cache_is_born_in_memory(run):
    """A sparse file would end in SIGBUS when the disk is full."""
    assert run(FROM_THE_START, "file", "allocation").startswith("False True True []")


def test_a_disk_that_is_full_at_birth_leaves_the_cache_in_memory(run):
    said = run(FROM_THE_START, "file", "space")
    assert said.startswith("False False True []")
    assert "No space left" in said


@pytest.mark.parametrize("backing", ["file", "memory"])
def test_an_error_of_the_disk_loses_nothing(run, backing):
    """What was refused is clean to the kernel afterwards: a cache in that file is not dropped any more."""
    said = run(FROM_THE_MIDDLE, backing, "write")
    assert "Input/output error" in said
    assert said.startswith("False" if backing == "file" else "True")


def test_an_error_behind_the_page_cache_loses_nothing(run):
    """Without O_DIRECT the write itself succeeds, and the disk's answer comes later."""
    assert "Input/output error" in run(FROM_THE_MIDDLE, "memory", "O_DIRECT through")


def test_a_disk_that_fills_up_loses_nothing(run):
    said = run(FROM_THE_MIDDLE, "memory", "space")
    assert said.startswith("True")
    assert "No space left" in said
