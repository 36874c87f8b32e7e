"""Which layers are sampled, and what a cache has to have for it."""

from __future__ import annotations

import numpy as np
import pytest

from psi_kv_governor.errors import BadInputError
from psi_kv_governor.ledger import LIVE
from psi_kv_governor.policy import Range

pytestmark = pytest.mark.llama


@pytest.mark.parametrize("n_layers", [1, 2, 3, 4, 6, 12, 24, 30, 32, 61, 80])
@pytest.mark.parametrize("wanted", [1, 4, 100])
def test_layers_lie_between_the_middle_and_five_sixths(n_layers, wanted):
    from psi_kv_governor.engine.llama.sampler import Sampling

    sampled = [int(name) for name in Sampling(layers=wanted).of([str(i) for i in range(n_layers)])]
    there = max(1, n_layers * 5 // 6 - n_layers // 2)
    assert len(sampled) == len(set(sampled)) == min(wanted, there)
    assert sampled == sorted(sampled)
    assert n_layers // 2 <= sampled[0]
    assert sampled[-1] < n_layers


@pytest.mark.parametrize("name", ["layers", "every", "window", "half_life"])
def test_settings_below_one_are_refused(name):
    from psi_kv_governor.engine.llama.sampler import Sampling

    with pytest.raises(BadInputError, match=f"{name} = 0 is not usable: give 1 or more"):
        Sampling(**{name: 0})


def test_no_distance_below_zero_is_near():
    from psi_kv_governor.engine.llama.sampler import Sampling

    with pytest.raises(BadInputError, match="near = -1 is not usable: give 0 or more"):
        Sampling(near=-1)


def test_what_a_cache_cannot_give_is_told():
    from psi_kv_governor.engine.llama.evidence import _why_no_attention, _why_no_keys
    from psi_kv_governor.engine.llama.native import TensorInfo

    plain = TensorInfo(name=b"cache_k_l0", type=1, head_dim=64, n_head=9)
    assert _why_no_keys([plain], {"0"}) == _why_no_attention([plain]) == ""
    assert _why_no_keys([], {"0"}) == "its keys are not in this process's memory"
    assert "(MLA)" in _why_no_keys([plain], set())
    assert "where a head's key begins" in _why_no_keys([TensorInfo(type=1, head_dim=0)], {"0"})
    assert "its keys are iq4_nl, and only" in _why_no_keys([TensorInfo(type=20, head_dim=64)], {"0"})
    assert "its keys are type 999, and only" in _why_no_keys([TensorInfo(type=999, head_dim=64)], {"0"})
    assert "flash attention on" in _why_no_attention([TensorInfo(type=1, head_dim=64)])
    assert "(ALiBi)" in _why_no_attention([TensorInfo(type=1, n_head=9, alibi=1)])


def test_attention_that_was_not_as_expected_lets_the_oldest_go(open_llm, monkeypatch, caplog):
    from psi_kv_governor.engine.llama.sampler import Sampler

    llm = open_llm("attention")
    llm.eval(llm.tokenize(b"the a of to and in is it " * 20)[:200])
    monkeypatch.setattr(Sampler, "failed", True)
    for _ in range(2):
        assert llm.governor.trim(0.3).problem == ""
    told = [record.message for record in caplog.records if "attention" in record.message]
    assert told == [
        "policy: the policy attention failed (this model's attention was not as expected, and none was "
        "sampled): the oldest blocks go instead"
    ]
    sinks, rest = llm._engine.ledger.ranges(LIVE)
    assert sinks == Range(0, 16)
    assert rest.stop == 200


def test_models_whose_layers_differ_in_heads_are_scored_layer_by_layer(open_llm):
    """Each tensor tells the length of its own heads, so nothing has to be alike."""
    llm = open_llm("keydiff")
    dims = {tensor.info.head_dim for tensor in llm._engine._rows.tensors if "k_l" in tensor.name}
    assert dims == {64}
    llm.eval(list(range(3, 53)))
    evidence = llm._engine.evidence
    whole = evidence.key_norms(Range(0, 50))
    evidence._keys[1].info.head_dim = 32  # as if layer 1 had twice as many heads
    other = evidence.key_norms(Range(0, 50))
    assert np.isfinite(other).all()
    assert not np.array_equal(whole, other)
    np.testing.assert_allclose(other.mean(), 1.0, rtol=1e-5)
