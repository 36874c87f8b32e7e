"""States, pickles and cleared caches: as those of a `Llama`, and the cell map stays true."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
from engine_help import (
    RECOMPUTED,
    anonymous_bytes,
    assert_map_is_true,
    evict,
    greedy,
    logits_after,
    places,
    plain_twin,
    rows_at,
    run_python,
    some_tokens,
    spill,
)
from models import LARGE, LARGE_HYBRID

from psi_kv_governor import GovernedLlama
from psi_kv_governor.errors import EngineError
from psi_kv_governor.ledger import LIVE
from psi_kv_governor.policy.base import Range

pytestmark = pytest.mark.llama
TOKENS = some_tokens(300)


def shuffled(llm: GovernedLlama) -> None:
    """A context whose positions are not in the order of their cells."""
    llm.eval(TOKENS[:200])
    evict(llm, (20, 60), (100, 130))
    llm.eval(TOKENS[200:])
    llm.make_whole()
    order = llm._engine.track.map.cells(Range(0, 300))
    assert np.any(np.diff(order) < 0)


@pytest.mark.parametrize("prepare", [lambda llm: llm.eval(TOKENS), shuffled])
def test_a_state_comes_back_with_every_row(open_llm, prepare):
    llm = open_llm()
    prepare(llm)
    rows = [rows_at(llm, p) for p in range(300)]
    spill(llm, (100, 200))
    state = pickle.loads(pickle.dumps(llm.save_state()))  # made whole first
    llm.reset()
    llm.eval(some_tokens(50, seed=9))
    llm.load_state(state)
    assert places(llm) == dict.fromkeys(range(300), LIVE)
    assert [rows_at(llm, p) for p in range(300)] == rows
    assert_map_is_true(llm)
    spill(llm, (100, 200))
    assert llm.governor.restore().missing == 0
    assert [rows_at(llm, p) for p in range(300)] == rows


def test_a_loaded_context_knows_its_tokens(open_llm):
    llm = open_llm()
    llm.eval(TOKENS)
    state = llm.save_state()
    llm.reset()
    llm.eval(some_tokens(300, seed=9))
    llm.load_state(state)
    twin = plain_twin(llm)
    twin.eval(TOKENS)
    evict(llm, (20, 200))
    assert llm.make_whole() == 0
    np.testing.assert_allclose(logits_after(llm, 5), logits_after(twin, 5), rtol=0, atol=RECOMPUTED)


def test_states_of_plain_and_governed_models_are_exchanged(open_llm):
    llm = open_llm()
    twin = plain_twin(llm)
    twin.eval(TOKENS)
    llm.load_state(twin.save_state())
    spill(llm, (50, 250))
    llm.governor.restore()
    expected = logits_after(twin, 5)
    np.testing.assert_array_equal(logits_after(llm, 5), expected)
    assert_map_is_true(llm)
    twin.reset()
    twin.eval([1, 2, 3])
    llm.n_tokens = 300
    llm._ctx.kv_cache_seq_rm(-1, 300, -1)
    twin.load_state(llm.save_state())
    np.testing.assert_array_equal(logits_after(twin, 5), expected)


def test_a_state_whose_cells_are_not_where_it_says_is_used_and_not_governed(open_llm):
    """A plain Llama's state after a cut and other tokens: nothing tells in which order its cells are."""
    llm = open_llm()
    shuffled(llm)
    state = llm.save_state()
    del state.positions_by_cell
    other = open_llm()
    other.load_state(state)
    assert "not where it was expected" in other.governor.capabilities.spill.why
    with pytest.raises(EngineError, match="until the cache is next empty"):
        other.governor.trim()
    assert other.governor._engine.release() == 0
    np.testing.assert_array_equal(logits_after(other, 5), logits_after(llm, 5))
    other.reset()
    other.eval(TOKENS)
    assert other.governor.trim().cells > 0


def test_a_state_that_does_not_fit_leaves_an_empty_context(open_llm):
    """llama.cpp would decode on at the state's length, with nothing before it and without a word."""
    large, small = open_llm(), open_llm(n_ctx=256)
    large.eval(TOKENS)
    small.eval(TOKENS[:100])
    with pytest.raises(RuntimeError, match="Failed to set llama state data"):
        small.load_state(large.save_state())
    assert greedy(small, TOKENS[:200], 5) == greedy(plain_twin(small), TOKENS[:200], 5)
    assert small.governor.capabilities.spill.able
    assert_map_is_true(small)


def test_a_state_is_not_saved_with_holes(open_llm, source):
    llm = open_llm(settings={"quiet_s": 1e6})
    llm.eval(TOKENS)
    source.stall = 1.0
    llm.governor.step()
    with pytest.raises(EngineError, match="tokens are not in the cache: save the state when the pressure is"):
        llm.save_state()


def test_a_trim_just_before_the_copy_does_not_get_into_the_state(open_llm):
    """The governor may act between making the context whole and copying it."""
    llm = open_llm()
    llm.eval(TOKENS)
    rows = [rows_at(llm, p) for p in range(300)]
    make_whole = llm.make_whole

    def then_trimmed(*arguments):
        missing = make_whole(*arguments)
        spill(llm, (100, 200))
        return missing

    llm.make_whole = then_trimmed
    state = llm.save_state()
    del llm.make_whole
    llm.load_state(state)
    assert places(llm) == dict.fromkeys(range(300), LIVE)
    assert [rows_at(llm, p) for p in range(300)] == rows
    assert_map_is_true(llm)


CLEARED_UPSTREAM = """
import sys
if sys.argv[4] == "late":
    import llama_cpp
from psi_kv_governor import GovernedLlama, GovernorConfig
sys.path.insert(0, sys.argv[2])
from engine_help import SMALL, anonymous_bytes, some_tokens
config = GovernorConfig(store_dir=sys.argv[3])
llm = GovernedLlama(sys.argv[1], config=config, auto=False, **{**SMALL, "n_ctx": 16384})
llm.eval(some_tokens(100))
before = anonymous_bytes()
if sys.argv[5] == "load a state":
    llm.load_state(llm.save_state())
else:
    llm.reset()
    llm.eval(some_tokens(100))
llm.governor._engine.release()
print(anonymous_bytes() - before, 16384 * llm._engine.cell_bytes)
"""


@pytest.mark.parametrize("import_order", ["first", "late"])
@pytest.mark.parametrize(("shape", "step"), [(LARGE, "load a state"), (LARGE_HYBRID, "reset")])
def test_what_upstream_clears_by_hand_is_returned(tiny_model, folder, shape, step, import_order):
    """Loading a state, or resetting a hybrid model, zeroes the whole cache where the tap came too late."""
    here = Path(__file__).parent
    printed = run_python(CLEARED_UPSTREAM, tiny_model(shape), here, folder, import_order, step)
    more, whole = map(int, printed.split())
    assert whole >= 64 << 20
    assert more < 4 << 20


def test_pickling_opens_the_same_model_with_the_same_settings(open_llm):
    llm = open_llm(n_ctx=512, settings={"high": 0.25})
    copy = pickle.loads(pickle.dumps(llm))
    try:
        assert copy.governor.config == llm.governor.config
        assert copy.governor._thread is None  # auto=False, as the first
        assert copy.n_ctx() == 512
        assert greedy(copy, TOKENS, 5) == greedy(llm, TOKENS, 5)
        assert copy.governor.trim(1.0).spilled > 0
    finally:
        copy.close()


def test_clearing_the_cache_returns_its_memory(open_llm):
    llm = open_llm(LARGE, n_ctx=4096)
    llm.eval(some_tokens(2000))
    before = anonymous_bytes()
    llm._ctx.kv_cache_clear()
    llm.reset()
    assert before - anonymous_bytes() > 0.95 * 2000 * llm._engine.cell_bytes
    assert len(llm._engine.ledger) == 0
    llm.eval(TOKENS)
    twin = plain_twin(llm)
    twin.eval(TOKENS)
    np.testing.assert_array_equal(logits_after(llm, 5), logits_after(twin, 5))


def test_a_shorter_request_returns_what_it_no_longer_uses(open_llm):
    llm = open_llm(LARGE, n_ctx=4096)
    llm.eval(some_tokens(2000))
    before = anonymous_bytes()
    llm.create_completion(TOKENS[:10], max_tokens=2)
    llm.governor.step()  # also on a calm machine
    assert before - anonymous_bytes() > 0.9 * 1980 * llm._engine.cell_bytes
