"""Models whose cache can't give up a middle range run as they do without a governor, and it is said why."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest
from engine_help import anonymous_bytes, greedy, logits, logits_after, plain_twin, some_tokens
from models import HYBRID, LARGE_HYBRID, LARGE_SLIDING, MAMBA, SLIDING, Shape

from psi_kv_governor.control import Mode
from psi_kv_governor.engine.base import Capabilities, Capability
from psi_kv_governor.errors import EngineError

pytestmark = pytest.mark.llama
PROMPT = some_tokens(400)


class Kind(NamedTuple):
    shape: Shape
    arguments: dict[str, bool]
    releases: bool
    why: str
    """Part of the reason for which it can't spill."""


KINDS = {
    "recurrent": Kind(MAMBA, {}, False, "no KV cache of rows"),
    "hybrid": Kind(HYBRID, {}, True, "folds all tokens into one state"),
    "sliding window": Kind(SLIDING, {"swa_full": False}, True, "sliding-window model keeps two caches"),
    "sliding window, kept whole": Kind(
        SLIDING, {"swa_full": True}, True, "sliding-window model keeps two caches"
    ),
}
kinds = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


@kinds
def test_it_says_what_it_can_do_and_why_not_the_rest(open_llm, caplog, kind):
    able: Capabilities = open_llm(kind.shape, **kind.arguments).governor.capabilities
    assert able.release.able == kind.releases
    assert not able.spill.able
    assert not able.recompute.able
    assert kind.why in able.spill.why
    warnings = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert any(kind.why in message and "spill" in message for message in warnings)


@kinds
def test_it_generates_what_a_plain_model_does(open_llm, kind):
    llm = open_llm(kind.shape, settings={"poll_s": 0.001, "poll_busy_s": 0.001}, auto=True, **kind.arguments)
    twin = plain_twin(llm, **kind.arguments)
    for prompt in (PROMPT, [*PROMPT[:200], *some_tokens(30, seed=1)], PROMPT):
        assert greedy(llm, prompt, 60) == greedy(twin, prompt, 60)
    np.testing.assert_array_equal(logits(llm), logits(twin))


@kinds
def test_under_pressure_it_goes_on_and_holds(open_llm, source, kind):
    llm = open_llm(kind.shape, **kind.arguments)
    twin = plain_twin(llm, **kind.arguments)
    source.stall = 1.0
    llm.eval(PROMPT), twin.eval(PROMPT)
    llm.governor.step()
    assert llm.governor.status().mode is Mode.HOLDING
    np.testing.assert_array_equal(logits_after(llm, 5), logits_after(twin, 5))
    with pytest.raises(EngineError, match=kind.why):
        llm.governor.trim()
    assert llm.governor.restore().cells == 0
    assert llm.make_whole() == 0


@kinds
def test_states_are_saved_and_loaded(open_llm, kind):
    llm = open_llm(kind.shape, **kind.arguments)
    twin = plain_twin(llm, **kind.arguments)
    expected = []
    for model in (llm, twin):
        model.eval(PROMPT)
        state = model.save_state()
        model.eval(some_tokens(20, seed=2))
        model.load_state(state)
        expected.append(logits_after(model, 5))
    np.testing.assert_array_equal(*expected)
    assert llm.governor.capabilities.release.able == kind.releases


@pytest.mark.parametrize(
    ("shape", "arguments"),
    [(LARGE_HYBRID, {}), (LARGE_SLIDING, {"swa_full": False})],
    ids=["hybrid", "sliding window"],
)
def test_what_a_shorter_request_no_longer_uses_is_returned(open_llm, shape, arguments):
    llm = open_llm(shape, n_ctx=4096, **arguments)
    llm.eval(some_tokens(1500))
    before = anonymous_bytes()
    llm.reset()
    llm.eval(PROMPT[:20])
    llm.governor.step()
    assert before - anonymous_bytes() > 0.9 * 1480 * llm._engine.cell_bytes > 5 << 20


def test_a_sliding_window_is_not_made_larger_by_governing(open_llm):
    """Sequences for parking would triple the small cache, and nothing can be parked there."""
    assert open_llm(SLIDING, swa_full=False).context_params.n_seq_max == 1


def test_a_model_with_one_plain_cache_can_do_everything(open_llm):
    able = open_llm().governor.capabilities
    assert able == Capabilities(release=Capability(True), spill=Capability(True), recompute=Capability(True))
