"""Evidence from a real cache against numpy: keys read in place, and attention sampled while decoding."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from psi_kv_governor.config import GovernorConfig
from psi_kv_governor.errors import BadInputError
from psi_kv_governor.ledger import LIVE
from psi_kv_governor.policy import Range

pytestmark = pytest.mark.llama

F16, Q4_0, Q8_0 = 1, 2, 8  # enum ggml_type
TEXT = (
    "The lighthouse keeper wrote the number 4711 on the wall, went down the stairs, and forgot about it. "
    "Every evening ships passed by the rocks, and every evening the lamp was lit an hour before sunset. "
)


def tokens_of(llm, count: int) -> list[int]:
    tokens = llm.tokenize((TEXT * 9).encode())
    assert len(tokens) >= count
    return tokens[:count]


def floats(rows: np.ndarray, kind: int) -> np.ndarray:
    """Rows as they lie in memory, shape (n, bytes), to (n, values)."""
    if kind == F16:
        return rows.copy().view(np.float16).astype(np.float64)
    blocks = rows.reshape(len(rows), -1, 34)
    scales = blocks[:, :, :2].copy().view(np.float16).astype(np.float64)
    return (scales * blocks[:, :, 2:].view(np.int8)).reshape(len(rows), -1)


def live_positions(llm) -> list[int]:
    return [position for run in llm._engine.ledger.ranges(LIVE) for position in range(*run)]


def keys_of(llm, kind: int, positions: list[int]) -> np.ndarray:
    """The cached keys, shape (layers, positions, heads, head_dim)."""
    engine = llm._engine
    cells = engine.track.map.cells(Range(0, len(engine.ledger)))[positions]
    tensors = [tensor for tensor in engine._rows.tensors if "k_l" in tensor.name]
    dim = tensors[0].info.head_dim
    return np.stack([floats(t.memory[cells], kind).reshape(len(cells), -1, dim) for t in tensors])


@pytest.mark.parametrize("kind", [F16, Q8_0])
def test_key_scores_are_those_of_the_papers(open_llm, demo_model, kind):
    llm = open_llm("keydiff", model=demo_model, type_k=kind, type_v=kind)
    llm.eval(tokens_of(llm, 150))
    llm._engine.trim([Range(40, 70)], None)  # a hole, and cells that are used again
    llm.eval(tokens_of(llm, 20))
    live = live_positions(llm)
    assert len(live) == 140
    keys = keys_of(llm, kind, live)
    assert keys.shape == (30, 140, 3, 64)

    norms = np.linalg.norm(keys, axis=-1)
    unit = keys / norms[..., None]
    anchor = unit.mean(axis=1, keepdims=True)
    cosines = (unit * anchor).sum(axis=-1) / np.linalg.norm(anchor, axis=-1)
    part = Range(30, 160)
    here = [i for i, position in enumerate(live) if part.start <= position < part.stop]
    rows = [live[i] - part.start for i in here]

    evidence = llm._engine.evidence
    found = evidence.key_diffs(part)
    np.testing.assert_allclose(found[rows], -cosines.mean(axis=(0, 2))[here], atol=1e-5)
    assert np.isnan(np.delete(found, rows)).all()
    relative = norms / norms.mean(axis=1, keepdims=True)
    np.testing.assert_allclose(evidence.key_norms(part)[rows], relative.mean(axis=(0, 2))[here], rtol=1e-5)


def attention_of(queries: np.ndarray, keys: np.ndarray, position: int, seen: np.ndarray) -> np.ndarray:
    """Softmax of one token's queries (heads, dim) over the keys (n, heads_kv, dim) of the positions `seen`
    up to its own, averaged over the heads; 1 is an equal share."""
    visible = seen <= position
    logits = np.einsum("hd,nhd->hn", queries, np.repeat(keys, len(queries) // keys.shape[1], axis=1))
    logits[:, ~visible] = -np.inf
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    return (weights / weights.sum(axis=1, keepdims=True)).mean(axis=0) * visible.sum()


@pytest.mark.parametrize("kind", [F16, Q8_0])
def test_sampled_attention_is_the_softmax_of_the_model(open_llm, open_captured, demo_model, kind):
    from psi_kv_governor.engine.llama.sampler import Sampling

    sampling = Sampling(layers=1, every=3, window=8, half_life=4, near=6)
    layer = int(sampling.of([str(i) for i in range(30)])[0])
    llm = open_llm("window", model=demo_model, type_k=kind, type_v=kind)
    llm._engine.evidence.collect(frozenset({"attention"}), sampling)
    plain, capture = open_captured(layer, type_k=kind, type_v=kind)

    tokens = tokens_of(llm, 60)
    sums, weights, used = np.zeros(60), np.zeros(60), np.zeros(60)
    sampled = singles = 0
    keep = 0.5 ** (1 / sampling.half_life)
    for start, stop in [(0, 40), *((i, i + 1) for i in range(40, 60))]:
        llm.eval(tokens[start:stop])
        plain.eval(tokens[start:stop])
        singles += 1
        queries = capture.taken()
        assert queries.shape == (stop - start, 9, 64)
        if stop - start == 1 and (singles - 1) % sampling.every:
            continue
        keys = keys_of(llm, kind, list(range(stop)))[layer]
        for position in range(max(start, stop - sampling.window), stop):
            sampled += 1
            share = attention_of(queries[position - start], keys, position, np.arange(stop))
            seen = slice(0, max(0, position + 1 - sampling.near))
            sums[seen] = keep * sums[seen] + share[seen]
            weights[seen] = keep * weights[seen] + 1
            used[seen][share[seen] > 1.0] = sampled

    evidence = llm._engine.evidence
    assert evidence._sampler.queries == sampled == 8 + 6
    assert not evidence._sampler.failed
    known = weights > 0
    assert not known.all()  # the newest tokens came after the last sample
    mean = np.where(known, sums / np.maximum(weights, 1e-9), np.nan)
    # Where a token's share is an equal one to the last digit, used or not is a matter of rounding.
    np.testing.assert_array_equal(np.isnan(evidence.last_used(Range(0, 60))), ~known)
    assert (evidence.last_used(Range(0, 60)) == used)[known].mean() > 0.98
    pooled = [np.nanmean(mean[max(0, i - 2) : i + 3]) if known[i] else np.nan for i in range(60)]
    tolerance = (
        2e-3 if kind == F16 else 4e-3
    )  # queries stay f32 here; llama.cpp rounds them to the keys' type
    np.testing.assert_allclose(evidence.attention(Range(0, 60)), pooled, rtol=tolerance)
    np.testing.assert_allclose(evidence.attention(Range(20, 31)), pooled[20:31], rtol=tolerance)


def logits(llm) -> np.ndarray:
    """After the last token, shape (n_vocab,)."""
    import llama_cpp

    return np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(llm.ctx, -1), (llm.n_vocab(),)).copy()


def test_sampling_changes_no_bit_of_the_logits(open_llm):
    from psi_kv_governor.engine.llama.sampler import Sampling

    calm, sampled = open_llm("window"), open_llm("window")
    sampled._engine.evidence.collect(frozenset({"attention"}), Sampling(layers=30, every=1))
    tokens = tokens_of(calm, 80)
    for start, stop in [(0, 70), *((i, i + 1) for i in range(70, 80))]:
        for llm in (calm, sampled):
            llm.eval(tokens[start:stop])
        assert np.array_equal(logits(calm), logits(sampled))
    assert sampled._engine.evidence._sampler.queries == 32 + 10


def sample_all(llm) -> None:
    """Begin anew, with what is near as well: the tests' contexts are short."""
    from psi_kv_governor.engine.llama.sampler import Sampling

    llm._engine.evidence.collect(frozenset({"attention"}), Sampling(near=0))


@pytest.mark.parametrize("near", [0, 1, 40])
def test_what_is_near_to_every_query_is_not_observed(open_llm, near):
    """The sampled queries of a prompt's batch are its last tokens, and look most at themselves."""
    from psi_kv_governor.engine.llama.sampler import Sampling

    llm = open_llm("window")
    llm._engine.evidence.collect(frozenset({"attention"}), Sampling(near=near, window=8))
    llm.eval(tokens_of(llm, 100))
    known = ~np.isnan(llm._engine.evidence.attention(Range(0, 100)))
    assert known.tolist() == [position <= 99 - near for position in range(100)]


def test_what_is_spilled_keeps_its_last_attention(open_llm):
    llm = open_llm("attention", settings={"store": "disk", "store_reserve_bytes": 0})
    sample_all(llm)
    llm.eval(tokens_of(llm, 200))
    evidence, part = llm._engine.evidence, Range(60, 100)
    before = evidence._placed(part, evidence._sampler.attention)
    assert np.isfinite(before).all()
    assert llm._engine.trim([part], llm.governor._store).spilled == part.cells
    for token in tokens_of(llm, 24):
        llm.eval([token])
    assert np.array_equal(before, evidence._placed(part, evidence._sampler.attention))
    assert np.isnan(evidence.key_diffs(part)).all()  # their rows are away
    llm.governor.restore()
    assert np.array_equal(before, evidence._placed(part, evidence._sampler.attention))
    assert np.isfinite(evidence.key_diffs(part)).all()


def test_a_cell_that_is_used_again_begins_anew(open_llm):
    llm = open_llm("attention")
    sample_all(llm)
    llm.eval(tokens_of(llm, 100))
    evidence, part = llm._engine.evidence, Range(20, 60)
    cells = set(llm._engine.track.map.cells(part).tolist())
    llm._engine.trim([part], None)
    assert np.isnan(evidence.attention(part)).all()
    llm.eval(tokens_of(llm, 1))
    assert set(llm._engine.track.map.cells(Range(100, 101)).tolist()) <= cells
    assert np.isnan(evidence.last_used(Range(100, 101))).all()  # not sampled yet
    llm.reset()
    llm._ctx.kv_cache_clear()
    llm.eval(tokens_of(llm, 2))
    assert np.isfinite(evidence.attention(Range(0, 2))).all()


def test_reading_keys_changes_nothing(open_llm):
    llm = open_llm("keydiff")
    llm.eval(tokens_of(llm, 100))
    before = keys_of(llm, F16, list(range(100)))
    first = llm._engine.evidence.key_diffs(Range(0, 100))
    assert np.array_equal(first, llm._engine.evidence.key_diffs(Range(0, 100)))
    assert np.array_equal(before, keys_of(llm, F16, list(range(100))))


def test_an_empty_cache_knows_nothing(open_llm):
    llm = open_llm("hybrid")
    evidence = llm._engine.evidence
    for give in (evidence.key_norms, evidence.key_diffs, evidence.attention, evidence.last_used):
        assert give(Range(0, 0)).shape == (0,)
    assert llm.governor.trim(1.0).cells == 0


@pytest.mark.parametrize("name", ["fifo", "lru", "random", "keynorm", "keydiff", "attention", "hybrid"])
def test_a_trim_by_any_policy_comes_back_bit_for_bit(open_llm, name):
    llm = open_llm(name, settings={"store": "disk", "store_reserve_bytes": 0, "floor_cells": 0})
    tokens = tokens_of(llm, 330)
    llm.eval(tokens[:320])
    cell = llm._engine.track.map.cells(Range(0, 320)).copy()
    before = keys_of(llm, F16, list(range(320)))
    trimmed = llm.governor.trim(0.6)
    assert trimmed.problem == ""
    assert trimmed.spilled == trimmed.cells >= 0.6 * (320 - 16 - 32)
    restored = llm.governor.restore()
    assert (restored.cells, restored.missing) == (trimmed.cells, 0)
    assert np.array_equal(cell, llm._engine.track.map.cells(Range(0, 320)))
    assert np.array_equal(before, keys_of(llm, F16, list(range(320))))


def test_the_blob_of_most_worth_comes_back_first_and_of_it_the_better_end(open_llm):
    llm = open_llm("window", settings={"store": "disk", "store_reserve_bytes": 0})
    llm.eval(tokens_of(llm, 300))
    engine = llm._engine
    parts = [Range(40, 80), Range(100, 160), Range(200, 220)]
    assert engine.trim(parts, llm.governor._store).spilled == 120
    worth = np.zeros(300)
    worth[100:130], worth[130:160], worth[40:80] = 2.0, 9.0, 1.0

    def of(part: Range) -> float:
        return float(worth[part.start : part.stop].mean())

    assert engine.restore(20, None, of).cells == 20
    assert not engine.ledger.holes(Range(140, 160))
    assert engine.ledger.holes() == 100
    assert engine.restore(45, None, of).cells == 45
    assert not engine.ledger.holes(Range(100, 160))
    assert [engine.ledger.holes(part) for part in parts] == [35, 0, 20]


@pytest.mark.parametrize("name", ["keynorm", "keydiff", "lru", "attention"])
def test_keys_of_another_type_are_refused_in_one_line(open_llm, name):
    with pytest.raises(BadInputError) as refused:
        open_llm(name, type_k=Q4_0, type_v=Q4_0)
    assert str(refused.value) == (
        f"the policy {name} can't be used with this cache: its keys are q4_0, and only f32, f16, bf16, q8_0 "
        "can be read (type_k); use window, fifo, random"
    )


def test_the_default_gives_way_to_the_window_where_the_cache_can_not_serve_it(open_llm, caplog):
    llm = open_llm(GovernorConfig().policy, type_k=Q4_0, type_v=Q4_0)
    assert [record.message for record in caplog.records if "can't be used" in record.message] == [
        "policy: the policy hybrid can't be used with this cache (its keys are q4_0, and only f32, f16, "
        "bf16, q8_0 can be read (type_k)): the oldest blocks go"
    ]
    llm.eval(tokens_of(llm, 200))
    assert llm.governor.trim(0.3).problem == ""
    sinks, rest = llm._engine.ledger.ranges(LIVE)
    assert sinks == Range(0, 16)
    assert rest.stop == 200


def test_without_flash_attention_keys_can_be_scored_and_attention_not(open_llm):
    llm = open_llm("keydiff", flash_attn=False)
    llm.eval(tokens_of(llm, 60))
    assert np.isfinite(llm._engine.evidence.key_diffs(Range(0, 60))).all()
    with pytest.raises(BadInputError, match="attention can be sampled only with flash attention on; use"):
        open_llm("attention", flash_attn=False)


def test_the_process_computes_with_subnormals_as_before(open_llm):
    """A library linked with -ffast-math would flush them to zero in every thread, and change the logits."""
    open_llm("window")
    assert np.float32(1e-40) * np.float32(0.5) > 0


def test_keys_are_scored_while_tokens_are_decoded(open_llm):
    llm = open_llm("keydiff")
    llm.eval(tokens_of(llm, 300))
    evidence, part = llm._engine.evidence, Range(0, 300)
    alone, seen, done = evidence.key_norms(part), [], threading.Event()

    def score() -> None:
        while not done.is_set():
            seen.append(evidence.key_norms(part))

    scoring = threading.Thread(target=score)
    scoring.start()
    for token in tokens_of(llm, 100):
        llm.eval([token])
    done.set()
    scoring.join()
    assert seen
    for found in seen:  # the mean that they are relative to moves a little with every token
        np.testing.assert_allclose(found, alone, rtol=0.1)


@pytest.mark.parametrize("kind", [F16, Q8_0])
def test_lone_blocks_return_most_of_their_bytes(open_llm, kind):
    llm = open_llm("random", n_ctx=4096, type_k=kind, type_v=kind, settings={"block_cells": 64})
    llm.eval((tokens_of(llm, 500) * 6)[:3000])
    trimmed = llm.governor.trim(0.4)
    assert len(list(llm._engine.ledger.ranges(LIVE))) > 3  # blocks lie apart
    assert trimmed.bytes_returned > 0.8 * trimmed.cells * llm._engine.cell_bytes
