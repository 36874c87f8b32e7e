"""Evidence from a real cache against numpy: keys read in place, and attention sampled while decoding."""

from __future__ import annotations

import ctypes
import importlib.util
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from evidence_help import F16, Q4_0, Q8_0, Capture, attention_of, keys_of, tokens_of

from psi_kv_governor.cache import Plan, Range, Step, Verb
from psi_kv_governor.engines.llama.client import Client, InProcess
from psi_kv_governor.engines.llama.engine import LlamaEngine
from psi_kv_governor.engines.llama.evidence import LlamaEvidence, Sampling
from psi_kv_governor.errors import BadInputError
from psi_kv_governor.native import building

pytestmark = pytest.mark.llama

SETTINGS: dict[str, Any] = {"n_ctx": 512, "n_threads": 1, "n_threads_batch": 1, "verbose": False}


class Governed:
    """A plain Llama, and the engine over its cache."""

    def __init__(self, llm: Any, engine: LlamaEngine) -> None:
        self.llm, self.engine = llm, engine

    def evidence(self) -> LlamaEvidence:
        (cache,) = self.engine.snapshot().caches
        return self.engine.evidence(cache.id, 0)

    def mask(self, start: int, stop: int) -> None:
        (cache,) = self.engine.snapshot().caches
        step = Step(verb=Verb.MASK, cache=cache.id, sequence=0, ranges=(Range(start, stop),))
        assert self.engine.apply(Plan(steps=(step,))).masked == stop - start


@pytest.fixture
def open_governed(shallow_model, folder, agent) -> Iterator[Callable[..., Governed]]:
    import llama_cpp

    opened = []
    client = Client(InProcess(agent.serve))

    def open_(sampling: Sampling | None = None, **arguments: Any) -> Governed:
        agent.configure(str(folder), in_file=True, reserve_bytes=0, limit_bytes=0)
        llm = llama_cpp.Llama(str(shallow_model), **{**SETTINGS, "flash_attn": True, **arguments})
        address = ctypes.cast(llm.ctx, ctypes.c_void_p).value or 0
        engine = LlamaEngine(client, pid=1, place=str(folder), backing="file", context=lambda: address)
        engine.collect(frozenset({"attention"}) if sampling else frozenset(), sampling)
        opened.append(llm)
        return Governed(llm, engine)

    yield open_
    for llm in opened:
        llm.close()
    LlamaEngine(client, pid=1, place="", backing="memory").collect(frozenset())


@pytest.fixture
def open_captured(shallow_model, tmp_path, agent) -> Iterator[Callable[..., Any]]:
    """Opens the demo model with an eval callback of the user's own, which captures one layer's queries."""
    import llama_cpp
    from llama_cpp import _internals

    built = tmp_path / "capture.so"
    headers = Path(importlib.util.find_spec("llama_cpp").origin).parents[1] / "include"
    source = Path(__file__).with_name("capture.c")
    command = [building.compiler(), "-O1", "-shared", "-fPIC", f"-I{headers}", source, "-o", built]
    subprocess.run(command, check=True, capture_output=True)
    capture_eval = ctypes.CDLL(str(built)).capture_eval
    opened = []

    def open_(layer: int, **arguments: Any) -> tuple[Any, Capture]:
        llm = llama_cpp.Llama(str(shallow_model), **{**SETTINGS, "flash_attn": True, **arguments})
        opened.append(llm)
        capture = Capture(layer=layer)
        llm._ctx.close()
        callback = ctypes.cast(capture_eval, ctypes.c_void_p).value
        llm.context_params.cb_eval = llama_cpp.ggml_backend_sched_eval_callback(callback)
        llm.context_params.cb_eval_user_data = ctypes.addressof(capture)
        llm._ctx = _internals.LlamaContext(model=llm._model, params=llm.context_params, verbose=False)
        llm._stack.callback(llm._ctx.close)
        return llm, capture

    yield open_
    for llm in opened:
        llm.close()


@pytest.mark.parametrize("kind", [F16, Q8_0])
def test_key_scores_are_those_of_the_papers(open_governed, kind):
    made = open_governed(type_k=kind, type_v=kind)
    made.llm.eval(tokens_of(made.llm, 150))
    keys = keys_of(made.llm, kind, 150)
    made.mask(40, 70)
    live = np.delete(np.arange(150), np.arange(40, 70))
    keys = keys[:, live]
    norms = np.linalg.norm(keys, axis=-1)
    unit = keys / norms[..., None]
    anchor = unit.mean(axis=1, keepdims=True)
    cosines = (unit * anchor).sum(axis=-1) / np.linalg.norm(anchor, axis=-1)
    part = Range(30, 150)
    here = [i for i, position in enumerate(live) if part.start <= position < part.stop]
    rows = [live[i] - part.start for i in here]

    evidence = made.evidence()
    found = evidence.key_diffs(part)
    np.testing.assert_allclose(found[rows], -cosines.mean(axis=(0, 2))[here], atol=1e-5)
    assert np.isnan(np.delete(found, rows)).all()
    relative = norms / norms.mean(axis=1, keepdims=True)
    np.testing.assert_allclose(evidence.key_norms(part)[rows], relative.mean(axis=(0, 2))[here], rtol=1e-5)


@pytest.mark.parametrize("kind", [F16, Q8_0])
def test_sampled_attention_is_the_softmax_of_the_model(open_governed, open_captured, kind):
    sampling = Sampling(layers=1, every=3, window=8, half_life=4, near=6)
    layer = 4  # of 6: the middle one between the middle and five sixths of the depth
    made = open_governed(sampling, type_k=kind, type_v=kind)
    plain, capture = open_captured(layer, type_k=kind, type_v=kind)

    tokens = tokens_of(made.llm, 60)
    sums, weights, used = np.zeros(60), np.zeros(60), np.zeros(60)
    sampled = singles = 0
    keep = 0.5 ** (1 / sampling.half_life)
    for start, stop in [(0, 40), *((i, i + 1) for i in range(40, 60))]:
        made.llm.eval(tokens[start:stop])
        plain.eval(tokens[start:stop])
        singles += 1
        queries = capture.taken()
        assert queries.shape == (stop - start, 9, 64)
        if stop - start == 1 and (singles - 1) % sampling.every:
            continue
        keys = keys_of(made.llm, kind, stop)[layer]
        for position in range(max(start, stop - sampling.window), stop):
            sampled += 1
            share = attention_of(queries[position - start], keys, position, np.arange(stop))
            seen = slice(0, max(0, position + 1 - sampling.near))
            sums[seen] = keep * sums[seen] + share[seen]
            weights[seen] = keep * weights[seen] + 1
            used[seen][share[seen] > 1.0] = sampled

    assert sampled == 8 + 6
    evidence = made.evidence()
    known = weights > 0
    assert not known.all()  # the newest tokens came after the last sample
    mean = np.where(known, sums / np.maximum(weights, 1e-9), np.nan)
    # Where a token's share is an equal one to the last digit, used or not is a matter of rounding.
    np.testing.assert_array_equal(np.isnan(evidence.last_used(Range(0, 60))), ~known)
    assert (evidence.last_used(Range(0, 60)) == used)[known].mean() > 0.98
    pooled = [np.nanmean(mean[max(0, i - 2) : i + 3]) if known[i] else np.nan for i in range(60)]
    # Queries stay f32 here; llama.cpp rounds them to the keys' type.
    tolerance = 2e-3 if kind == F16 else 4e-3
    np.testing.assert_allclose(evidence.attention(Range(0, 60)), pooled, rtol=tolerance)
    np.testing.assert_allclose(evidence.attention(Range(20, 31)), pooled[20:31], rtol=tolerance)


def logits(llm) -> np.ndarray:
    """After the last token, shape (n_vocab,)."""
    import llama_cpp

    return np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(llm.ctx, -1), (llm.n_vocab(),)).copy()


def test_a_programs_own_callback_is_called_however_many_contexts_there_are(open_governed, open_captured):
    import llama_cpp
    from llama_cpp import _internals

    made = open_governed(Sampling(every=1))
    small = llama_cpp.llama_context_default_params()
    small.n_ctx = small.n_batch = small.n_ubatch = 32
    small.n_threads = small.n_threads_batch = 1
    contexts = [
        _internals.LlamaContext(model=made.llm._model, params=small, verbose=False) for _ in range(70)
    ]
    for context in contexts:  # MAX_CONTEXTS is 64
        batch = llama_cpp.llama_batch_get_one((ctypes.c_int32 * 1)(1), 1)
        assert llama_cpp.llama_decode(context.ctx, batch) == 0
    plain, capture = open_captured(4)
    plain.eval(tokens_of(plain, 12))
    assert capture.taken().shape == (12, 9, 64)
    for context in contexts:
        context.close()
    later, captured_later = open_captured(4)  # the agent has room again
    later.eval(tokens_of(later, 12))
    assert captured_later.taken().shape == (12, 9, 64)


def test_sampling_changes_no_bit_of_the_logits(open_governed):
    calm = open_governed()
    calm_logits = []
    tokens = tokens_of(calm.llm, 80)
    steps = [(0, 70), *((i, i + 1) for i in range(70, 80))]
    for start, stop in steps:
        calm.llm.eval(tokens[start:stop])
        calm_logits.append(logits(calm.llm))
    sampled = open_governed(Sampling(layers=6, every=1))
    for (start, stop), expected in zip(steps, calm_logits, strict=True):
        sampled.llm.eval(tokens[start:stop])
        assert np.array_equal(logits(sampled.llm), expected)


@pytest.mark.parametrize("near", [0, 1, 40])
def test_what_is_near_to_every_query_is_not_observed(open_governed, near):
    """The sampled queries of a prompt's batch are its last tokens, and look most at themselves."""
    made = open_governed(Sampling(near=near, window=8))
    made.llm.eval(tokens_of(made.llm, 100))
    known = ~np.isnan(made.evidence().attention(Range(0, 100)))
    assert known.tolist() == [position <= 99 - near for position in range(100)]


def test_what_is_masked_keeps_its_last_attention(open_governed):
    made = open_governed(Sampling(near=0))
    made.llm.eval(tokens_of(made.llm, 200))
    part = Range(60, 100)
    before = made.evidence().attention(part)
    assert np.isfinite(before).all()
    made.mask(58, 102)  # with the neighbours over which it is averaged
    for token in tokens_of(made.llm, 24):
        made.llm.eval([token])
    np.testing.assert_array_equal(before, made.evidence().attention(part))
    assert np.isnan(made.evidence().key_diffs(part)).all()  # their rows are away


def test_a_cell_that_is_used_again_begins_anew(open_governed):
    made = open_governed(Sampling(near=0, every=8))
    made.llm.eval(tokens_of(made.llm, 100))
    made.llm.n_tokens = 40
    made.llm.eval(tokens_of(made.llm, 1))
    assert np.isnan(made.evidence().last_used(Range(40, 41))).all()  # not sampled yet


def test_reading_keys_changes_nothing(open_governed):
    made = open_governed()
    made.llm.eval(tokens_of(made.llm, 100))
    before = keys_of(made.llm, F16, 100)
    first = made.evidence().key_diffs(Range(0, 100))
    assert np.array_equal(first, made.evidence().key_diffs(Range(0, 100)))
    assert np.array_equal(before, keys_of(made.llm, F16, 100))


def test_keys_of_another_type_are_told(open_governed):
    made = open_governed(type_k=Q4_0, type_v=Q4_0, n_ctx=4096)  # a cache of less is none to the agent
    made.llm.eval(tokens_of(made.llm, 50))
    assert "can't be read" in made.evidence().why_not("key_diffs")


def test_without_flash_attention_attention_can_not_be_sampled(open_governed):
    made = open_governed(Sampling(), flash_attn=False)
    made.llm.eval(tokens_of(made.llm, 50))
    assert "flash attention is off" in made.evidence().why_not("attention")


def test_the_process_computes_with_subnormals_as_before(open_governed):
    open_governed()
    assert np.float32(1e-39) * np.float32(0.5) > 0


def test_keys_are_scored_while_tokens_are_decoded(open_governed):
    made = open_governed()
    made.llm.eval(tokens_of(made.llm, 100))
    thread = threading.Thread(target=lambda: [made.llm.eval([token]) for token in tokens_of(made.llm, 40)])
    thread.start()
    while thread.is_alive():
        assert np.isfinite(made.evidence().key_diffs(Range(0, 100))).all()
    thread.join()


@pytest.mark.parametrize("name", ["layers", "every", "window", "half_life"])
def test_settings_below_one_are_refused(name):
    with pytest.raises(BadInputError, match=f"{name} = 0 is not usable: give 1 or more"):
        Sampling(**{name: 0})


def test_no_distance_below_zero_is_near():
    with pytest.raises(BadInputError, match="near = -1 is not usable: give 0 or more"):
        Sampling(near=-1)
