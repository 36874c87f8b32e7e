"""What nobody uses goes back to the system, and what was never written is not looked at for it."""

from __future__ import annotations

import ctypes
import mmap
import random
from pathlib import Path

import pytest
from torture import Context

from psi_kv_governor.engines.llama.client import Client, Op

pytestmark = pytest.mark.llama
CELL_BYTES = 8192  # of LARGE
N_SEQ, MOST = 4, 500
SLACK_BYTES = 1 << 20
"""Pages in which used cells end: a few runs in 32 tensors at most."""


@pytest.fixture(params=["file", "memory"])
def backing(request) -> str:
    return request.param


@pytest.fixture(params=[True, False], ids=["one stream", "a stream for each sequence"])
def context(request, open_raw, backing) -> Context:
    return open_raw(in_file=backing == "file", unified=request.param)


def resident(client: Client, context: Context) -> int:
    (region,) = [
        region
        for region in client.regions(count_resident=True)
        if region.context == ctypes.cast(context.ctx, ctypes.c_void_p).value
    ]
    return region.resident


def release(client: Client, context: Context) -> int:
    (region,) = [r for r in client.regions(count_resident=False) if r.context]
    reply = client.ask(Op.RELEASE, region.id)
    assert reply.done, reply.problem
    assert reply.problem == ""
    return reply.n_bytes


class Caller:
    """Does to four sequences what servers do, and knows how long each is."""

    def __init__(self, context: Context, seed: int) -> None:
        self.context, self.api = context, context.api
        self.chance = random.Random(seed)
        self.lengths = [0] * N_SEQ

    def call(self) -> None:
        what = self.chance.choice([self.prompt, self.prompt, self.cut, self.shift, self.load, self.copy])
        what(self.chance.randrange(N_SEQ))

    def prompt(self, s: int) -> None:
        n = min(self.chance.choice([1, 40, 200]), MOST - self.lengths[s])
        if n > 0 and self.context.decode([(3 + i % 200, self.lengths[s] + i, s) for i in range(n)]) == 0:
            self.lengths[s] += n

    def cut(self, s: int) -> None:
        self.lengths[s] = self.chance.choice([0, self.lengths[s] // 2])
        self.api.llama_memory_seq_rm(self.context.memory, s, self.lengths[s], -1)

    def shift(self, s: int) -> None:
        """The next graph writes all cells."""
        if self.lengths[s] > 60:
            self.api.llama_memory_seq_rm(self.context.memory, s, 10, 30)
            self.api.llama_memory_seq_add(self.context.memory, s, 30, self.lengths[s], -20)
            self.lengths[s] -= 20

    def load(self, s: int) -> None:
        if self.lengths[s]:
            buffer, size = self.context.sequence_state(s)
            self.api.llama_memory_seq_rm(self.context.memory, s, -1, -1)
            self.api.llama_state_seq_set_data(self.context.ctx, buffer, size, s)

    def copy(self, s: int) -> None:
        """Between streams it is done whole, and only before the next graph."""
        other = (s + 1) % N_SEQ
        self.api.llama_memory_seq_rm(self.context.memory, other, -1, -1)
        self.api.llama_memory_seq_cp(self.context.memory, s, other, -1, -1)
        self.lengths[other] = self.lengths[s]


@pytest.mark.parametrize("seed", range(3))
def test_whatever_was_done_nothing_of_the_free_cells_stays(context, client, seed):
    caller = Caller(context, seed)
    caller.prompt(0)
    for _ in range(60):
        caller.call()
        if caller.chance.random() < 0.3:
            state = bytes(context.state())
            release(client, context)
            used = sum(caller.lengths) * CELL_BYTES
            assert resident(client, context) <= used + SLACK_BYTES
            assert bytes(context.state()) == state


@pytest.mark.parametrize("backing", ["file"], indirect=True)
def test_cells_that_were_never_written_are_not_looked_at(context, client, folder):
    """A release in a cache of 131,072 cells of an 8B's shape looked at 16 GB, while the program waited."""
    context.decode([(3 + i, i, 0) for i in range(200)])
    maps = [line for line in Path("/proc/self/maps").read_text().splitlines() if str(folder) in line]
    last_page = max(int(line.split("-")[1].split()[0], 16) for line in maps) - mmap.PAGESIZE
    assert not in_memory(last_page)
    assert ctypes.string_at(last_page, 1) == b"\0"
    assert in_memory(last_page)
    context.api.llama_memory_seq_rm(context.memory, 0, 10, -1)
    assert release(client, context) > 150 * CELL_BYTES
    assert in_memory(last_page)


def in_memory(page: int) -> bool:
    """As the kernel says."""
    answer = ctypes.c_ubyte(0)
    size = ctypes.c_size_t(mmap.PAGESIZE)
    assert ctypes.CDLL(None).mincore(ctypes.c_void_p(page), size, ctypes.byref(answer)) == 0
    return bool(answer.value & 1)
