"""Which cells belong to whom is asked of llama.cpp, while others look."""

from __future__ import annotations

import ctypes
import threading

import pytest

from psi_kv_governor.engines.llama.engine import LlamaEngine

pytestmark = pytest.mark.llama


def test_a_snapshot_in_the_middle_of_a_question_has_all_of_a_sequence(open_raw, client):
    """Positions that changed are asked for with the next token. Ten looks in a thousand such tokens found the
    cache empty, so that 200 of them show it nearly always."""
    context = open_raw(in_file=False, unified=True, n_ubatch=64)
    address = ctypes.cast(context.ctx, ctypes.c_void_p).value
    engine = LlamaEngine(client, pid=1, place="", backing="memory", context=lambda: address)
    assert context.decode([(3 + at, at, 0) for at in range(100)]) == 0
    looks: list[int] = []
    over = threading.Event()

    def look() -> None:
        while not over.is_set():
            for cache in engine.snapshot().caches:
                looks.append(sum(one.next_position for one in cache.sequences))

    looking = threading.Thread(target=look)
    looking.start()
    for _ in range(200):
        for delta in (1, -1):
            context.api.llama_memory_seq_add(context.memory, 0, 0, -1, delta)
        assert context.decode([(7, 100, 0)]) == 0
        context.api.llama_memory_seq_rm(context.memory, 0, 100, -1)
    over.set()
    looking.join()
    assert min(looks) >= 100
