"""Recall on real contexts: what is parked comes back for a question, and nothing changes otherwise."""

from __future__ import annotations

import contextlib
import ctypes

import numpy as np
import pytest

from gguf_models import LARGE, Shape
from psi_kv_governor.cache import Plan, Range, Recall, Recalled, Step, Verb
from psi_kv_governor.engines.llama.client import Client, InProcess
from psi_kv_governor.engines.llama.engine import LlamaEngine
from psi_kv_governor.engines.llama.evidence import Sampling
from psi_kv_governor.policy.hybrid import WANTED

pytestmark = pytest.mark.llama
TEXT = (
    "The museum opens at nine and closes at five. Visitors walk through the halls and look at the paintings. "
    "In the garden the trees stand in long rows, and the gardener waters them in the evening. "
)
FACT = "\n\nThe treasure is buried under the fountain.\n\n"
QUESTION = "\n\nThe treasure is buried under the"
SETTINGS = Recall(mode="ahead", sink_cells=32, window_cells=64, bytes_per_s=1e9)


@contextlib.contextmanager
def opened(agent, place, model, *, backing="file", **arguments):
    """A plain `llama_cpp.Llama` with an engine over its caches."""
    import llama_cpp

    agent.configure(str(place), in_file=backing == "file", reserve_bytes=0, limit_bytes=0)
    chosen = {"n_ctx": 768, "n_threads": 1, "n_threads_batch": 1, "verbose": False, "flash_attn": True}
    llm = llama_cpp.Llama(str(model), **{**chosen, **arguments})
    address = ctypes.cast(llm.ctx, ctypes.c_void_p).value
    client = Client(InProcess(agent.serve))
    engine = LlamaEngine(client, pid=1, place=str(place), backing=backing, context=lambda: address)
    yield llm, engine
    engine.recall(Recall())
    llm.close()


@pytest.fixture
def open_llm(folder, agent):
    with contextlib.ExitStack() as stack:
        yield lambda model, **arguments: stack.enter_context(opened(agent, folder, model, **arguments))


def logits(llm) -> np.ndarray:
    import llama_cpp

    return np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(llm.ctx, -1), (llm.n_vocab(),)).copy()


def do(engine, verb, *ranges):
    (cache,) = engine.snapshot().caches
    step = Step(verb=verb, cache=cache.id, sequence=0, ranges=tuple(Range(*part) for part in ranges))
    return engine.apply(Plan(steps=(step,)))


def sequence(engine):
    return engine.snapshot().caches[0].sequences[0]


def since(engine, before: Recalled) -> Recalled:
    now = engine.recalled()
    names = ("read_bytes", "blocks", "exchanges", "decoded_again")
    return Recalled(**{name: getattr(now, name) - getattr(before, name) for name in names})


class Story:
    """A text with a fact in it, of which three quarters were given up, the fact among them."""

    def __init__(self, llm, engine) -> None:
        self.llm, self.engine = llm, engine
        words = TEXT * 2 + FACT + TEXT * 8
        self.tokens = llm.tokenize(words.encode())
        self.question = llm.tokenize(QUESTION.encode(), add_bos=False)
        before = len(llm.tokenize((TEXT * 2).encode()))
        self.fact = Range(before, before + len(llm.tokenize(FACT.encode(), add_bos=False)))
        self.gone = (32, 32 + 3 * (len(self.tokens) - 128) // 4)
        assert self.gone[0] < self.fact.start
        assert self.fact.stop < self.gone[1]
        llm.eval(self.tokens)

    def read(self, **settings) -> Recalled:
        """From the whole text: give up, ask."""
        do(self.engine, Verb.UNMASK)
        self.llm.n_tokens = len(self.tokens)
        self.engine.recall(_with(settings))
        before = self.engine.recalled()
        do(self.engine, Verb.MASK, self.gone)
        self.llm.eval(self.question)
        return since(self.engine, before)

    def forget(self) -> None:
        """As if nothing had been given up or asked: what was wanted is forgotten when nothing is missing."""
        self.engine.collect(frozenset())
        do(self.engine, Verb.UNMASK)
        self.llm.n_tokens = len(self.tokens)
        self.llm.eval(self.question)
        self.llm.n_tokens = len(self.tokens)
        self.engine.recall(Recall())

    def answer(self) -> str:
        return self.llm.detokenize([int(logits(self.llm).argmax())], special=True).decode()


def _with(settings) -> Recall:
    return Recall(**{**{name: getattr(SETTINGS, name) for name in SETTINGS.__struct_fields__}, **settings})


@pytest.fixture(scope="module")
def decoded_once(agent, folder_of_module, demo_model):
    """It takes four seconds."""
    with opened(agent, folder_of_module, demo_model) as (llm, engine):
        yield Story(llm, engine)


@pytest.fixture
def story(decoded_once):
    decoded_once.forget()
    return decoded_once


def test_a_fact_that_was_given_up_comes_back_for_its_question(story):
    off = story.read(mode="off")
    assert off.exchanges == 0
    assert "fountain" not in story.answer()
    told = story.read()
    assert "fountain" in story.answer()
    assert told.decoded_again == 1
    assert told.read_bytes > 0
    (cache,) = story.engine.snapshot().caches
    wanted = story.engine.evidence(cache.id, 0).demand(story.fact)  # to a policy it is one more score
    assert np.nanmax(wanted) >= WANTED


def test_what_was_asked_for_is_no_news_to_the_next_pressure(story):
    """A trim would keep what questions of long ago wanted, and give up what is looked at now."""
    story.read()
    do(story.engine, Verb.UNMASK)
    story.llm.eval(story.question)  # nobody looks for anything while all is there
    (cache,) = story.engine.snapshot().caches
    evidence = story.engine.evidence(cache.id, 0)
    assert np.isnan(evidence.demand(Range(0, len(story.tokens)))).all()
    do(story.engine, Verb.MASK, story.gone)
    assert np.isnan(evidence.demand(story.fact)).all()


def test_who_goes_back_to_what_was_sampled_knows_of_no_later_question(story):
    story.engine.collect(frozenset({"attention"}))
    story.read(mode="off")
    evidence = story.engine.evidence(story.engine.snapshot().caches[0].id, 0)
    sampled = evidence.sampled()
    story.read()
    assert not np.isnan(evidence.demand(story.fact)).all()
    evidence.rewind(sampled)
    assert np.isnan(evidence.demand(story.fact)).all()


def test_as_many_cells_are_live_after_an_exchange_as_before(story):
    told = story.read()
    masked = sequence(story.engine).masked
    assert told.blocks > 0
    assert sum(part.cells for part in masked) == story.gone[1] - story.gone[0]
    assert len(story.tokens) + len(story.question) == sequence(story.engine).next_position
    for part in masked:  # what is protected stays
        assert part.start >= SETTINGS.sink_cells
        assert part.stop <= len(story.tokens) + len(story.question) - SETTINGS.window_cells


def test_what_was_exchanged_comes_back_bit_for_bit(story):
    story.llm.eval(story.question)
    whole = logits(story.llm)
    story.read()
    do(story.engine, Verb.UNMASK)
    story.llm.n_tokens = len(story.tokens)
    story.engine.recall(Recall())
    story.llm.eval(story.question)
    assert np.array_equal(logits(story.llm), whole)


def test_nothing_is_done_while_nothing_is_masked(story):
    story.engine.recall(Recall())
    story.llm.eval(story.question)
    whole = logits(story.llm)
    story.llm.n_tokens = len(story.tokens)
    story.engine.recall(SETTINGS)
    before = story.engine.recalled()
    story.llm.eval(story.question)
    assert np.array_equal(logits(story.llm), whole)
    assert since(story.engine, before) == Recalled()


def test_nothing_comes_in_while_memory_is_short(story):
    assert story.read(paused=True) == Recalled()
    assert "fountain" not in story.answer()


def test_what_is_marked_stays(story):
    live = Range(story.gone[1], len(story.tokens) - 64)
    told = story.read(marked=(live,))
    assert told.exchanges == 0  # nothing may go for it
    assert told.decoded_again == 0


def test_following_exchanges_blocks_and_decodes_nothing_again(story):
    told = story.read(mode="follow")
    assert told.blocks > 0
    assert told.decoded_again == 0


def test_no_more_is_read_than_allowed(story):
    told = story.read(bytes_per_s=float(1 << 20))  # less than three blocks of the demo model
    assert told.blocks <= 2


def test_a_summary_is_less_than_two_in_a_hundred_of_what_is_parked(story):
    story.read()
    (cache,) = story.engine.snapshot().caches
    assert 0 < story.engine.recalled().summary_bytes <= 0.02 * cache.cell_bytes


def test_keys_in_q8_0_are_summarised_too_and_plain_memory_is_exchanged(open_llm, demo_model):
    story = Story(*open_llm(demo_model, backing="memory", type_k=8, type_v=8))
    assert story.read().decoded_again == 1
    assert "fountain" in story.answer()


def test_drafts_to_be_verified_are_never_decoded_twice(story):
    import llama_cpp
    from llama_cpp import _internals

    story.read(mode="follow")
    story.engine.recall(SETTINGS)
    before = story.engine.recalled()
    batch = _internals.LlamaBatch(n_tokens=8, embd=0, n_seq_max=1, verbose=False)
    batch.set_batch(story.question[:6], n_past=story.llm.n_tokens, logits_all=True)
    assert llama_cpp.llama_decode(story.llm.ctx, batch.batch) == 0
    batch.close()
    assert since(story.engine, before).decoded_again == 0


def test_what_is_decoded_twice_is_observed_once(open_llm, demo_model):
    llm, engine = open_llm(demo_model)
    engine.collect(frozenset({"attention"}), Sampling(near=0, every=1))
    story = Story(llm, engine)
    evidence = engine.evidence(engine.snapshot().caches[0].id, 0)
    before = evidence.sampled()

    def observed(mode) -> tuple[int, np.ndarray]:
        evidence.rewind(before)
        told = story.read(mode=mode)
        sums_weights_used = np.frombuffer(evidence.sampled(), dtype=np.float32).reshape(3, -1)
        return told.decoded_again, sums_weights_used[1, : SETTINGS.sink_cells]

    once, weights = observed("follow")
    twice, same = observed("ahead")
    engine.collect(frozenset())
    assert (once, twice) == (0, 1)
    assert (weights > 1).all()
    np.testing.assert_array_equal(weights, same)


def test_a_cache_without_flash_attention_says_why_not(open_llm, tiny_model):
    llm, engine = open_llm(tiny_model(LARGE), flash_attn=False)
    llm.eval([1, 2, 3])
    assert "flash attention is off" in engine.recalled().why_not


@pytest.mark.parametrize(
    ("shape", "kind"),
    [
        pytest.param(LARGE, 1, id="summaries of 3 % of a cell"),
        pytest.param(Shape("llama", n_layer=16, n_head=8, n_head_kv=8), 2, id="keys in q4_0"),
    ],
)
def test_what_can_t_be_summarised_is_said_and_everything_else_works(open_llm, tiny_model, shape, kind):
    # More than 32 MiB: less may lie in the heap, whatever was open before.
    llm, engine = open_llm(tiny_model(shape), type_k=kind, type_v=kind, n_ctx=4352)
    engine.recall(SETTINGS)
    llm.eval([5] * 256)
    before = engine.recalled()
    assert "can't be read here, or their summaries would take more than 2 %" in engine.recalled().why_not
    do(engine, Verb.MASK, (64, 128))
    llm.eval([6, 7, 8])
    assert sequence(engine).masked_cells == 64
    do(engine, Verb.UNMASK)
    assert sequence(engine).masked_cells == 0
    assert since(engine, before) == Recalled()


@pytest.mark.parametrize("others", [100, 3000])
def test_what_is_marked_stays_however_much_is(story, others):
    live = Range(story.gone[1], len(story.tokens) - 64)
    far = [Range(10_000 + 2 * i, 10_001 + 2 * i) for i in range(others)]
    assert story.read(marked=(live, *far)).exchanges == 0
    assert story.read(marked=(*far, live)).exchanges == 0
