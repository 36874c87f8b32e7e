"""A context that is made smaller and whole again behind the program's back. On the CPU, where it is forced:
the code is that of a device (test_device_memory.py)."""

from __future__ import annotations

import functools
import threading
import time
from pathlib import Path

import llama_cpp
import numpy as np
import pytest
from resize_cpu import MIB, PROMPT, SETTINGS, SMALL, TOKEN, filled, text_of
from resize_help import apply, cache_of, cells, next_logits

from gguf_models import HYBRID, LARGE, LARGE_SLIDING, MAMBA
from held_memory import held_bytes
from psi_kv_governor.cache import Domain, Verb
from psi_kv_governor.engines.llama.resize import engine as resize_engine
from psi_kv_governor.engines.llama.resize import resizer as resizing
from waiting import PATIENCE_S

pytestmark = pytest.mark.llama


@pytest.fixture
def open_llm(open_tiny):
    return functools.partial(open_tiny, SETTINGS, SMALL)


@pytest.fixture
def plain(tiny_model):
    return lambda shape=LARGE, **arguments: llama_cpp.Llama(str(tiny_model(shape)), **{**SMALL, **arguments})


# -- smaller, and whole again ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [1, 8], ids=["f16", "q8_0"])
def test_what_went_comes_back_bit_for_bit(open_llm, kind):
    llm = filled(open_llm(type_k=kind, type_v=kind))
    before = next_logits(llm, TOKEN)
    assert apply(llm, Verb.MASK, (16, 100), (140, 300)).masked == 244
    assert cells(llm) == 256
    without = next_logits(llm, TOKEN)
    assert not np.array_equal(without, before)
    assert apply(llm, Verb.UNMASK).cells == 244
    assert cells(llm) == 4096
    assert np.array_equal(next_logits(llm, TOKEN), before)


def test_free_cells_go_without_anything_lost(open_llm):
    llm = filled(open_llm())
    before = next_logits(llm, TOKEN)
    free = cache_of(llm).free_resident_bytes
    apply(llm, Verb.RELEASE)
    assert cells(llm) < 1024
    assert free == (4096 - cells(llm)) * cache_of(llm).cell_bytes
    assert cache_of(llm).free_resident_bytes == 0
    assert np.array_equal(next_logits(llm, TOKEN), before)


def test_a_request_after_parking_reads_all_of_it_back(open_llm, plain):
    ours, theirs = open_llm(), plain()
    arguments = {"max_tokens": 8, "temperature": 0.0}
    assert text_of(ours(PROMPT, **arguments)) == text_of(theirs(PROMPT, **arguments))
    parked = apply(ours, Verb.PARK)
    assert parked.cells > 300
    assert parked.masked == 0
    assert cells(ours) == 256
    assert cache_of(ours).sequences[0].parked_bytes == parked.cells * cache_of(ours).cell_bytes
    longer = PROMPT + text_of(theirs(PROMPT, **arguments)) + " and then"
    ours_says, theirs_says = ours(longer, **arguments), theirs(longer, **arguments)
    assert text_of(ours_says) == text_of(theirs_says)
    assert "psi_kv" not in ours_says


def test_a_smaller_context_grows_with_the_conversation(open_llm, plain):
    ours, theirs = open_llm(), plain()
    arguments = {"max_tokens": 8, "temperature": 0.0}
    filled(ours, "the")
    apply(ours, Verb.RELEASE)
    assert cells(ours) == 256
    assert ours.n_ctx() == 4096  # as long as it was asked for
    assert text_of(ours("the dog", **arguments)) == text_of(theirs("the dog", **arguments))
    assert cells(ours) == 256
    assert text_of(ours(PROMPT * 4, **arguments)) == text_of(theirs(PROMPT * 4, **arguments))
    assert 1024 < cells(ours) < 4096


def test_a_context_of_another_size_is_not_sampled_from(open_llm, plain):
    """It has no logits: the last token is decoded again."""
    ours, theirs = filled(open_llm()), filled(plain())
    ours._ctx.patience_s = 0.0  # as if nobody had come for a while
    apply(ours, Verb.RELEASE)
    assert ours._ctx.stale
    assert ours.sample(temp=0.0) == theirs.sample(temp=0.0)
    assert ours.n_tokens == theirs.n_tokens


def test_nothing_moves_between_a_decode_and_its_token(open_llm, monkeypatch):
    monkeypatch.setattr(resize_engine, "_PATIENCE_S", PATIENCE_S)
    llm = filled(open_llm())
    llm._ctx.patience_s = 1e9
    waited = []
    thread = threading.Thread(target=lambda: waited.append(apply(llm, Verb.RELEASE)))
    thread.start()
    thread.join(0.2)
    assert thread.is_alive()
    assert cells(llm) == 4096
    token = llm.sample(temp=0.0)
    thread.join()  # with the token taken it has its moment
    assert cells(llm) < 1024
    llm.eval([token])


def test_requests_are_right_while_it_grows_and_shrinks_all_the_time(open_llm, plain):
    """A request that comes in the middle waits."""
    ours, theirs = open_llm(), plain()
    over = threading.Event()
    done, turn, until_s = [], 0, time.monotonic() + PATIENCE_S

    def disturb() -> None:
        verbs = [Verb.RELEASE, Verb.PARK, Verb.UNPARK]
        while not over.is_set():
            done.append(apply(ours, verbs[len(done) % 3]))

    thread = threading.Thread(target=disturb)
    thread.start()
    try:
        while turn < 6 or sum(result.cells > 0 for result in done) <= 3:
            assert time.monotonic() < until_s, "its size did not change"
            arguments = {"max_tokens": 20, "temperature": 0.0}
            prompt = PROMPT[: 100 * (turn % 6) + 50]
            turn += 1
            assert text_of(ours(prompt, **arguments)) == text_of(theirs(prompt, **arguments))
    finally:
        over.set()
        thread.join()


def test_fifty_times_over_nothing_is_leaked(open_llm):
    llm = filled(open_llm())
    before = next_logits(llm, TOKEN)

    def once() -> None:
        apply(llm, Verb.MASK, (16, 300))
        apply(llm, Verb.UNMASK)

    for _ in range(5):
        once()
    at_first = held_bytes()
    descriptors = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(45):
        once()
    assert held_bytes() < at_first + 4 * MIB
    assert len(list(Path("/proc/self/fd").iterdir())) <= descriptors
    assert np.array_equal(next_logits(llm, TOKEN), before)


# -- the same law and ladder -----------------------------------------------------------------------------


def test_the_governor_s_own_words_drive_it(open_llm, running):
    llm = filled(open_llm(), PROMPT * 4)
    first = llm.governor.trim(0.5)
    assert first.cells == 0  # free cells alone
    assert cells(llm) < 2048
    llm.eval([TOKEN])
    llm.sample()
    llm.n_tokens -= 1
    trimmed = llm.governor.trim(1.0)
    assert trimmed.masked > 200
    said = llm.create_completion(PROMPT * 4, max_tokens=3, temperature=0.0)
    assert said["psi_kv"]["masked_tokens"] >= trimmed.masked
    llm.governor.restore()
    assert cache_of(llm).sequences[0].masked == ()
    assert cells(llm) == 4096
    assert llm.heal() > 0
    assert cache_of(llm).sequences[0].affected == 0


def test_what_it_is_and_can_is_told(open_llm):
    told = open_llm().governor.status()
    description = open_llm().governor.engine.describe()
    assert description.domain is Domain.MANAGED
    assert description.capabilities.mask.able
    assert told.caches


def test_restores_come_at_once_and_nothing_is_released_for_tidiness(open_llm):
    llm = filled(open_llm())
    planner = llm.governor._planner
    snapshot = llm.governor.engine.snapshot()
    assert planner.release(snapshot) is None
    apply(llm, Verb.MASK, (16, 300))
    plan = planner.restore(llm.governor.engine.snapshot(), 1 << 40)
    assert plan.max_bytes == 1 << 40


# -- a program that does other things --------------------------------------------------------------------


def test_a_tail_that_is_cut_takes_its_files_with_it(open_llm, plain):
    ours, theirs = filled(open_llm()), filled(plain())
    apply(ours, Verb.MASK, (100, 300))
    for llm in (ours, theirs):
        llm.n_tokens = 80
    assert np.array_equal(next_logits(ours, TOKEN), next_logits(theirs, TOKEN))
    assert ours.governor.engine.masked(0) == 0


def test_a_conversation_taken_up_inside_of_what_went_brings_it_back(open_llm, plain):
    ours, theirs = filled(open_llm()), filled(plain())
    apply(ours, Verb.MASK, (100, 300))
    for llm in (ours, theirs):
        llm.n_tokens = 200
    assert np.array_equal(next_logits(ours, TOKEN), next_logits(theirs, TOKEN))


def test_saved_states_are_whole_and_go_in_whole(open_llm, plain):
    ours, theirs = filled(open_llm()), filled(plain())
    apply(ours, Verb.MASK, (16, 300))
    state = ours.save_state()
    theirs.load_state(state)
    apply(ours, Verb.PARK)
    ours.load_state(state)
    assert np.array_equal(next_logits(ours, TOKEN), next_logits(theirs, TOKEN))


def test_who_takes_the_address_has_a_context_that_stays(open_llm, plain):
    ours, theirs = filled(open_llm()), filled(plain())
    apply(ours, Verb.MASK, (16, 300))
    address = ours.ctx
    assert llama_cpp.llama_n_ctx(address) == 4096
    assert apply(ours, Verb.RELEASE).problem == "the program took the context's address"
    assert not ours.governor.engine.describe().capabilities.park.able
    assert np.array_equal(next_logits(ours, TOKEN), next_logits(theirs, TOKEN))


def test_a_model_that_is_closed_does_not_grow_for_it(open_llm, monkeypatch):
    llm = filled(open_llm())
    apply(llm, Verb.MASK, (16, 300))
    made = []
    monkeypatch.setattr(resizing.llama_cpp, "llama_init_from_model", lambda *_: made.append(1))
    llm.close()
    assert made == []


# -- what can't be made anew -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "arguments", "why"),
    [
        (MAMBA, {}, "state has no cells"),
        (HYBRID, {}, "state has no cells"),
        (LARGE_SLIDING, {"swa_full": False}, "sliding-window"),
        (LARGE, {"embedding": True}, "embeddings"),
    ],
)
def test_other_models_are_governed_page_by_page(open_llm, shape, arguments, why):
    from psi_kv_governor.engines.llama.resize.sizes import why_not

    llm = open_llm(shape, **arguments)
    assert why in why_not(llm._model.model, llm.context_params)
    assert llm.governor.engine.describe().domain is Domain.HOST
    if "embedding" not in arguments:
        assert llm("the", max_tokens=3)


def test_a_sliding_window_with_all_of_its_cells_is_made_anew(open_llm, plain):
    ours, theirs = filled(open_llm(LARGE_SLIDING, swa_full=True)), filled(plain(LARGE_SLIDING, swa_full=True))
    apply(ours, Verb.MASK, (16, 300))
    apply(ours, Verb.UNMASK)
    assert np.array_equal(next_logits(ours, TOKEN), next_logits(theirs, TOKEN))


def test_the_switch_of_long_rope_is_never_crossed(open_llm):
    llm = filled(open_llm(yarn_orig_ctx=1000))
    apply(llm, Verb.RELEASE)
    assert cells(llm) == 1024
    short = filled(open_llm(yarn_orig_ctx=4096))
    apply(short, Verb.RELEASE)
    assert cells(short) < 1024
