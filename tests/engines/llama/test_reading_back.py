"""What a graph reads that is not in memory: never page by page, and nothing for nothing."""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
from pathlib import Path

import pytest
from torture import Context

from major_faults import major_faults_of
from psi_kv_governor.engines.llama.client import Client, Op

pytestmark = pytest.mark.llama
CELL_BYTES = 8192  # of LARGE
TOKENS = [(3 + i % 200, i, 0) for i in range(1500)]
WAITS_S = 60
MADV_PAGEOUT = 21


class Pausing:
    """A callback of ggml that stops the graph in its middle, once, until it may go on."""

    def __init__(self, api) -> None:
        self.armed = False
        self.stopped, self.goes_on = threading.Event(), threading.Event()
        self.function = api.ggml_backend_sched_eval_callback(self._called)

    def decode(self, context: Context) -> threading.Thread:
        """One more token, whose graph stands still when this returns."""
        self.armed = True
        decoding = threading.Thread(target=context.decode, args=([(7, len(TOKENS), 0)],))
        decoding.start()
        assert self.stopped.wait(WAITS_S)
        return decoding

    def _called(self, _node, ask: bool, _user) -> bool:
        if self.armed and not ask:
            self.armed = False
            self.stopped.set()
            self.goes_on.wait(WAITS_S)
        return True


@pytest.fixture
def pausing():
    import llama_cpp as api

    return Pausing(api)


@pytest.fixture
def context(open_raw, pausing) -> Context:
    """One sequence in a cache born in a file."""
    context = open_raw(in_file=True, unified=True, callback=pausing.function)
    for start in range(0, len(TOKENS), 250):
        assert context.decode(TOKENS[start : start + 250]) == 0
    return context


def region_of(client: Client, context: Context):
    address = ctypes.cast(context.ctx, ctypes.c_void_p).value
    (region,) = [r for r in client.regions(count_resident=True) if r.context == address]
    return region


def test_what_the_running_graph_still_reads_goes_when_it_is_over(context, client, pausing):
    """It has its masks from its beginning: 140 MB came back page by page, in a token of 2.5 s for 0.1."""
    region = region_of(client, context)
    decoding = pausing.decode(context)
    replies = []
    masking = threading.Thread(
        target=lambda: replies.append(client.ask(Op.MASK, region.id, 0, ranges=[(100, 1400)]))
    )
    masking.start()
    masking.join(0.1)  # it is waited for until a second after its beginning: no other wrote one row before
    assert masking.is_alive()
    assert not replies
    pausing.goes_on.set()
    decoding.join(WAITS_S)
    masking.join(WAITS_S)
    assert replies[0].masked == 1300
    assert replies[0].n_bytes >= 0.98 * 1300 * CELL_BYTES
    assert region_of(client, context).resident <= 0.3 * len(TOKENS) * CELL_BYTES


def test_a_graph_that_takes_long_is_not_waited_for_for_ever(context, client, pausing):
    region = region_of(client, context)
    decoding = pausing.decode(context)
    reply = client.ask(Op.MASK, region.id, 0, ranges=[(100, 1400)])  # the graph stands still meanwhile
    pausing.goes_on.set()
    decoding.join(WAITS_S)
    assert reply.n_bytes >= 0.98 * 1300 * CELL_BYTES


def test_what_the_kernel_took_by_itself_is_read_ahead(context, client, folder):
    """One page after the other it came back at 32 MB/s."""
    state = bytes(context.state())
    assert client.ask(Op.WRITE, region_of(client, context).id, 0).problem == ""
    for fd in Path("/proc/self/fd").iterdir():
        if str(folder) in os.path.realpath(fd):
            os.fdatasync(int(fd.name))
    for line in Path("/proc/self/maps").read_text().splitlines():
        if str(folder) in line:
            first, last = (int(part, 16) for part in line.split()[0].split("-"))
            taken = ctypes.CDLL(None).madvise(
                ctypes.c_void_p(first), ctypes.c_size_t(last - first), MADV_PAGEOUT
            )
            assert taken == 0
    pages = len(TOKENS) * CELL_BYTES // mmap.PAGESIZE
    gone = pages - region_of(client, context).resident // mmap.PAGESIZE
    assert gone > 0.9 * pages
    assert major_faults_of(lambda: context.decode([(7, len(TOKENS), 0)])) < 0.25 * gone
    context.api.llama_memory_seq_rm(context.memory, 0, len(TOKENS), -1)
    assert bytes(context.state()) == state
