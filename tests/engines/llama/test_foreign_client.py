"""A client that decodes by itself on `llm.ctx`, as guidance does: upstream's methods are never called, so
nothing of ours could know of it but the agent."""

from __future__ import annotations

import ctypes
import threading
import time

import numpy as np
import pytest

from fakes import FakeSource
from gguf_models import LARGE
from psi_kv_governor import GovernedLlama, GovernorConfig
from psi_kv_governor.cache import Plan, Range, Step, Verb
from psi_kv_governor.errors import EngineError
from waiting import PATIENCE_S

pytestmark = pytest.mark.llama
TOKENS = [int(token) for token in np.random.default_rng(7).integers(3, 250, 1200)]
SMALL = {"n_ctx": 2048, "n_threads": 1, "n_threads_batch": 1, "verbose": False, "flash_attn": True}


class Client:
    """Keeps what it has decoded, cuts behind the common part, and decodes the rest."""

    def __init__(self, llm) -> None:
        import llama_cpp

        self.api, self.llm, self.done = llama_cpp, llm, []
        self.batch = llama_cpp.llama_batch_init(128, 0, 1)

    def logits(self, tokens: list[int]) -> np.ndarray:
        same = 0
        for one, other in zip(self.done, tokens[:-1], strict=False):
            if one != other:
                break
            same += 1
        memory = self.api.llama_get_memory(self.llm.ctx)
        self.api.llama_memory_seq_rm(memory, -1, same, -1)
        while same < len(tokens):
            part = tokens[same : same + 128]
            for i, token in enumerate(part):
                self.batch.token[i], self.batch.pos[i] = token, same + i
                self.batch.n_seq_id[i], self.batch.seq_id[i][0] = 1, 0
                self.batch.logits[i] = i == len(part) - 1
            self.batch.n_tokens = len(part)
            assert self.api.llama_decode(self.llm.ctx, self.batch) == 0
            same += len(part)
        self.done = list(tokens)
        row = self.api.llama_get_logits_ith(self.llm.ctx, -1)
        return np.ctypeslib.as_array(row, (self.llm.n_vocab(),)).copy()

    def state(self) -> bytes:
        size = self.api.llama_state_get_size(self.llm.ctx)
        buffer = (ctypes.c_uint8 * size)()
        return bytes(buffer)[: self.api.llama_state_get_data(self.llm.ctx, buffer, size)]

    def close(self) -> None:
        self.api.llama_batch_free(self.batch)


@pytest.fixture(params=["file", "memory"])
def pair(tiny_model, folder, request):
    """A governed model and a plain one, each with such a client."""
    import llama_cpp

    config = GovernorConfig(
        place=str(folder), backing=request.param, status_socket=False, sink_cells=16, window_cells=64,
        block_cells=16, floor_cells=64,
    )  # fmt: skip
    path = str(tiny_model(LARGE))
    llm = GovernedLlama(path, config=config, auto=False, source=FakeSource(), **SMALL)
    plain = llama_cpp.Llama(path, **SMALL)
    clients = Client(llm), Client(plain)
    yield clients
    for client in clients:
        client.close()
        client.llm.close()


def order(llm, verb: Verb, *ranges: Range):
    (cache,) = llm.governor.engine.snapshot().caches
    return llm.governor.engine.apply(
        Plan(steps=(Step(verb=verb, cache=cache.id, sequence=0, ranges=ranges),))
    )


def test_between_two_of_its_calls_parked_and_restored_context_stays_its_own(pair):
    """The first edition wrote an old conversation over the client's live cells, without a word."""
    ours, theirs = pair
    ours.llm("an ordinary call " * 20, max_tokens=2)
    theirs.llm("an ordinary call " * 20, max_tokens=2)
    assert ours.llm.governor.trim(1.0).bytes_returned > 0
    for client in pair:
        client.logits(TOKENS[:900])
    ours.llm.governor.restore()
    np.testing.assert_array_equal(
        ours.logits(TOKENS[:500] + TOKENS[900:1000]), theirs.logits(TOKENS[:500] + TOKENS[900:1000])
    )
    assert ours.state() == theirs.state()
    assert ours.llm.governor.last_result == {}


def test_while_another_thread_parks_every_call_of_it_is_right(pair):
    ours, theirs = pair
    over, returned = threading.Event(), []
    calls, until_s = 0, time.monotonic() + PATIENCE_S

    def park() -> None:
        while not over.wait(0.02):  # without a pause all time goes into reading the same pages back
            returned.append(order(ours.llm, Verb.PARK).bytes_returned)

    for client in pair:
        client.logits(TOKENS[:300])
    thread = threading.Thread(target=park)
    thread.start()
    try:
        while calls < 5 or sum(returned) <= 1 << 20:
            assert time.monotonic() < until_s, "nothing was parked"
            i, calls = calls % 5, calls + 1
            tokens = TOKENS[: 300 + 20 * i] + TOKENS[1000 : 1000 + 27 * i]
            np.testing.assert_array_equal(ours.logits(tokens), theirs.logits(tokens))
    finally:
        over.set()
        thread.join()
    assert ours.state() == theirs.state()


def test_what_it_decodes_while_some_is_masked_is_said_by_the_governor(pair):
    ours, _ = pair
    ours.logits(TOKENS[:600])
    assert ours.llm.governor.last_result == {}
    order(ours.llm, Verb.MASK, Range(100, 400))
    ours.logits(TOKENS[:620])
    assert ours.llm.governor.last_result == {"masked_tokens": 300, "affected_tokens": 20}


def test_only_it_has_its_tokens_so_only_it_can_decode_them_again(pair):
    ours, theirs = pair
    governor = ours.llm.governor
    for client in pair:
        client.logits(TOKENS[:600])
    order(ours.llm, Verb.MASK, Range(100, 400))
    ours.logits(TOKENS[:620])
    assert governor.heal() == 0  # the Llama knows nothing of these tokens
    governor.restore()
    ours.done = ours.done[: governor.engine.first_affected(0)]
    np.testing.assert_array_equal(ours.logits(TOKENS[:620]), theirs.logits(TOKENS[:620]))
    assert governor.last_result == {}


def see_an_image(llm, seed: int) -> str:
    """As a vision handler does: tokens of the text, then embeddings, decoded by itself, then an answer."""
    import llama_cpp as api

    llm.reset()
    api.llama_memory_seq_rm(api.llama_get_memory(llm.ctx), -1, 0, -1)
    llm.eval(llm.tokenize(b"what is this picture of " * 8))
    n = 100
    seen = np.random.default_rng(seed).standard_normal((n, llm.n_embd()), dtype=np.float32)
    batch = api.llama_batch_init(n, llm.n_embd(), 1)
    ctypes.memmove(batch.embd, seen.ctypes.data, seen.nbytes)
    for i in range(n):
        batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = (
            llm.n_tokens + i,
            1,
            0,
            i == n - 1,
        )
    batch.n_tokens = n
    assert api.llama_decode(llm.ctx, batch) == 0
    api.llama_batch_free(batch)
    llm.input_ids[llm.n_tokens : llm.n_tokens + n] = -1
    llm.n_tokens += n
    llm.eval([5])
    row = api.llama_get_logits_ith(llm.ctx, -1)
    return np.ctypeslib.as_array(row, (llm.n_vocab(),)).tobytes().hex()


def test_a_vision_handler_that_is_set_late_decodes_what_it_sees(pair):
    ours, theirs = pair
    answers = []
    for client in pair:
        client.llm.chat_handler = lambda llama, messages, **_: see_an_image(llama, messages[0]["content"])
    for seed in range(3):
        asked = [{"role": "user", "content": seed}]
        answers.append(ours.llm.create_chat_completion(asked))
        assert answers[-1] == theirs.llm.create_chat_completion(asked)
        assert order(ours.llm, Verb.PARK).bytes_returned > 0
        assert ours.state() == theirs.state()
    assert len(set(answers)) == 3


def test_a_governor_without_a_model_says_that_it_can_not_heal():
    from psi_kv_governor import Governor
    from psi_kv_governor.engines.llama.process import NoEngine

    governor = Governor(NoEngine("none here"), source=FakeSource())
    with pytest.raises(EngineError, match="whoever decodes"):
        governor.heal()
    governor.close()
