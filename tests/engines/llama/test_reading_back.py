"""What a graph reads that is not in memory: never page by page, and nothing for nothing."""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
import time
from pathlib import Path

import pytest
from torture import Context

from major_faults import major_faults_of
from psi_kv_governor.cache import Plan, Range, Step, Verb
from psi_kv_governor.engines.llama.client import Client, InProcess, Op
from psi_kv_governor.engines.llama.engine import LlamaEngine
from waiting import PATIENCE_S

pytestmark = pytest.mark.llama
CELL_BYTES = 8192  # of LARGE
TOKENS = [(3 + i % 200, i, 0) for i in range(1500)]
MADV_PAGEOUT = 21


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


def mask(client: Client, region: int, replies: list) -> None:
    replies.append(client.ask(Op.MASK, region, 0, ranges=[(100, 1400)]))


def test_what_the_running_graph_still_reads_goes_when_it_is_over(context, client, pausing):
    """It has its masks from its beginning: 140 MB came back page by page, in a token of 2.5 s for 0.1."""
    region, end = region_of(client, context), len(TOKENS)
    for _ in range(50):
        assert client.ask(Op.UNMASK, region.id, 0).done
        # No graph before the next one wrote as many rows: then it is waited for until a second after its
        # beginning. Where the machine stood still for as long, this turn shows nothing.
        assert context.decode([(7, end, 0), (7, end + 1, 0)]) == 0
        began_s = time.monotonic()
        decoding = pausing.decode(context, end + 2)
        replies = []
        masking = threading.Thread(target=mask, args=(client, region.id, replies))
        masking.start()
        masking.join(0.1)
        waits = masking.is_alive()
        pausing.go_on(decoding)
        in_time = time.monotonic() - began_s < 0.9
        masking.join(PATIENCE_S)
        end += 3
        if in_time:
            break
    assert in_time, "the machine stands still"
    assert waits
    assert replies[0].masked == 1300
    assert replies[0].n_bytes >= 0.98 * 1300 * CELL_BYTES
    assert region_of(client, context).resident <= 0.3 * len(TOKENS) * CELL_BYTES


@pytest.fixture
def two_running(open_raw, pausing) -> Context:
    """Two sequences of 400 cells in a cache born in a file."""
    context = open_raw(in_file=True, unified=True, callback=pausing.function)
    for start in range(0, 400, 100):
        for sequence in (0, 1):
            part = [(token, at, sequence) for token, at, _ in TOKENS[start : start + 100]]
            assert context.decode(part) == 0
    return context


def test_all_is_masked_before_any_of_it_is_parked(two_running, client, agent):
    """Each sequence would wait for the end of a graph of its own."""
    asked = []

    class Asking(Client):
        def ask(self, op, *args, **given):
            asked.append(op)
            return super().ask(op, *args, **given)

    region = region_of(client, two_running)
    engine = LlamaEngine(Asking(InProcess(agent.serve)), pid=os.getpid(), place="somewhere", backing="file")
    steps = tuple(
        Step(verb=Verb.MASK, cache=region.id, sequence=sequence, ranges=(Range(100, 300),))
        for sequence in (0, 1)
    )
    result = engine.apply(Plan(steps=steps, max_bytes=200 * CELL_BYTES))
    assert asked == [Op.MARK, Op.MARK, Op.MASK, Op.MASK]
    assert (result.masked, result.cells) == (400, 400)
    assert result.bytes_returned >= 0.9 * 400 * CELL_BYTES


def test_a_graph_that_began_with_the_masks_is_not_waited_for(two_running, client, pausing):
    region, end = region_of(client, two_running), 400
    for begin in (100, 130, 160, 200, 230, 260, 300, 330, 360):
        # No graph before the next one wrote as many rows: one that still reads what is masked would be waited
        # for until a second after its beginning, in every turn. Here only the disk is.
        assert two_running.decode([(7, end, 0), (7, end + 1, 0)]) == 0
        assert client.ask(Op.MARK, region.id, 1, ranges=[(begin, begin + 30)]).masked == 30
        began_s = time.monotonic()
        decoding = pausing.decode(two_running, end + 2)
        reply = client.ask(Op.MASK, region.id, 1, ranges=[(begin, begin + 30)])  # the graph stands still
        took_s = time.monotonic() - began_s
        pausing.go_on(decoding)
        assert reply.n_bytes >= 0.6 * 30 * CELL_BYTES
        end += 3
        if took_s < 1.0:
            break
    assert took_s < 1.0


def test_a_graph_that_takes_long_is_not_waited_for_for_ever(context, client, pausing):
    region = region_of(client, context)
    decoding = pausing.decode(context, len(TOKENS))
    reply = client.ask(Op.MASK, region.id, 0, ranges=[(100, 1400)])  # the graph stands still meanwhile
    pausing.go_on(decoding)
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
