"""What is in the file already is never written again, and at the floor there is next to nothing to do."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from gguf_models import LARGE
from psi_kv_governor import GovernedLlama
from psi_kv_governor.cache import Plan, Range, Step, Verb
from psi_kv_governor.config import GovernorConfig
from waiting import until

pytestmark = pytest.mark.llama

MOST_SHARE = 0.002
"""Of a core, when there is nothing left to give."""


@contextmanager
def filled(model: Path, config: GovernorConfig) -> Iterator[GovernedLlama]:
    """With 1,200 tokens in its context."""
    options = {"n_ctx": 2048, "n_threads": 1, "verbose": False, "flash_attn": True}
    with closing(GovernedLlama(str(model), config=config, auto=False, **options)) as llm:
        llm.eval([i % 240 + 5 for i in range(1200)])
        yield llm


def test_a_context_that_did_not_change_is_written_once_however_often_it_is_parked(tiny_model, folder):
    config = GovernorConfig(place=str(folder), place_reserve_bytes=0, backing="memory")
    with filled(tiny_model(LARGE), config) as llm:
        engine, written = llm.governor.engine, []
        for _ in range(3):
            cache = engine.snapshot().caches[0]
            part = (Range(0, 1024),)
            step = Step(verb=Verb.PARK, cache=cache.id, sequence=0, ranges=part)
            parked = engine.apply(Plan(steps=(step,)))
            assert parked.problem == ""
            assert parked.bytes_returned > 1 << 20
            written.append(parked.written_bytes)
            back = Step(verb=Verb.UNPARK, cache=cache.id, sequence=0, ranges=part)
            assert engine.apply(Plan(steps=(back,))).bytes_back > 1 << 20
        assert written[0] > 1 << 20
        assert written[1:] == [0, 0]
        assert engine.snapshot().written_bytes >= written[0]


@pytest.mark.parametrize("backing", ["file", "memory"])
def test_parts_of_what_was_written_behind_go_from_between_parts_that_stay(tiny_model, folder, backing):
    """As much as without; kernels since 6.16 keep what is written at once as one, and drop no part of it."""
    config = GovernorConfig(place=str(folder), place_reserve_bytes=0, backing=backing)
    comb = tuple(Range(at, at + 64) for at in range(64, 1000, 128))
    returned = {}
    for behind in (False, True):
        with filled(tiny_model(LARGE), config) as llm:
            engine = llm.governor.engine
            cache = engine.snapshot().caches[0]
            if behind:
                engine.apply(Plan(steps=(Step(verb=Verb.WRITE_BEHIND, cache=cache.id, sequence=0),)))
            mask = Step(verb=Verb.MASK, cache=cache.id, sequence=0, ranges=comb)
            returned[behind] = engine.apply(Plan(steps=(mask,))).bytes_returned
    assert returned[False] > 0.5 * 64 * len(comb) * cache.cell_bytes
    assert returned[True] >= 0.95 * returned[False]


def test_with_nothing_left_to_give_a_governor_takes_a_five_hundredth_of_a_core(tiny_model, folder):
    """By processor time and not by the clock: the machine is this one, and always short by its lines."""
    config = GovernorConfig(
        place=str(folder),
        place_reserve_bytes=0,
        headroom_low=1.0,
        headroom_plenty=1.0,
        headroom_low_bytes=1 << 60,
        headroom_plenty_bytes=1 << 60,
        floor_cells=1 << 20,
        status_socket=False,
    )
    with filled(tiny_model(LARGE), config) as llm:
        governor = llm.governor
        time.sleep(1.1)  # then the sequence is idle, and is parked whole
        until(lambda: governor.step() and governor.engine.snapshot().caches[0].resident_bytes <= 1 << 20)
        # The best of several: beside other work the same steps miss caches, and take twice as long.
        shares = (share_taken(governor) for _ in range(20))
        assert any(share < MOST_SHARE for share in shares)
        assert "headroom" in governor.status().reason


def share_taken(governor) -> float:
    """Processor time of 30 steps, as a share of the pauses that they ask for."""
    taken_s = paused_s = 0.0
    for _ in range(30):
        time.sleep(0.02)
        began_s = time.thread_time()
        paused_s += governor.step()
        taken_s += time.thread_time() - began_s
    return taken_s / paused_s
