"""A long decode is interrupted for somebody urgent, and run again: no token is lost or repeated."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import numpy as np
import pytest
from engine_help import RECOMPUTED, assert_map_is_true, evict, greedy, logits, plain_twin, some_tokens
from models import Shape

from psi_kv_governor.ledger import LIVE, LOST
from psi_kv_governor.policy.base import Range

from llama_cpp import _internals  # isort: skip

pytestmark = [pytest.mark.llama, pytest.mark.timeout(120)]
PROMPT = some_tokens(900)
SLOW = Shape("llama", n_embd=512, n_layer=8, n_head=8, n_head_kv=8, n_ff=1536)
"""A prefill of the prompt takes about a second."""


class Watched:
    """Runs `action` in a thread, and counts what llama_decode was called with."""

    def __init__(self, monkeypatch, action: Callable[[], object]) -> None:
        self.calls: list[tuple[int, int]] = []
        self.began = threading.Event()
        real = _internals.llama_cpp.llama_decode

        def decode(context, batch):
            self.began.set()
            code = real(context, batch)
            self.calls.append((int(batch.n_tokens), code))
            return code

        monkeypatch.setattr(_internals.llama_cpp, "llama_decode", decode)
        self.error: BaseException | None = None

        def run() -> None:
            try:
                action()
            except BaseException as error:
                self.error = error

        self.thread = threading.Thread(target=run, daemon=True)
        self.thread.start()
        assert self.began.wait(20)

    def end(self) -> None:
        self.thread.join(60)
        assert not self.thread.is_alive()
        if self.error:
            raise self.error

    @property
    def interrupted(self) -> int:
        return sum(code == 2 for _, code in self.calls)


def test_a_prefill_is_interrupted_at_once_and_gives_the_same_as_one_that_was_not(
    open_llm, monkeypatch, capfd
):
    llm = open_llm(SLOW, n_batch=900, n_ubatch=900)
    whole = plain_twin(llm, n_batch=900, n_ubatch=900)
    whole.eval(PROMPT)
    watched = Watched(monkeypatch, lambda: llm.eval(PROMPT))
    begin = time.monotonic()
    with llm._engine.at_safe_point(patience_s=0.0):
        waited_s = time.monotonic() - begin
        assert len(llm._engine.ledger) < len(PROMPT)
    watched.end()
    assert watched.interrupted == 1
    assert waited_s < 0.2  # the whole takes most of a second
    assert llm.n_tokens == len(llm._engine.ledger) == len(PROMPT)
    assert llm._engine.ledger.count(LIVE) == len(PROMPT)
    assert_map_is_true(llm)
    np.testing.assert_allclose(logits(llm), logits(whole), atol=RECOMPUTED)
    assert greedy(llm, PROMPT, 20) == greedy(whole, PROMPT, 20)
    whole.close()
    assert "removing memory" not in capfd.readouterr().err


def test_a_decode_is_waited_for_as_long_as_there_is_patience(open_llm, monkeypatch):
    llm = open_llm(SLOW, n_batch=200, n_ubatch=200)
    watched = Watched(monkeypatch, lambda: llm.eval(PROMPT[:200]))
    with llm._engine.at_safe_point(patience_s=30.0):
        pass
    watched.end()
    assert watched.interrupted == 0


def test_somebody_urgent_who_comes_again_and_again_does_not_hold_a_prefill_up_for_ever(open_llm, monkeypatch):
    llm = open_llm(SLOW, n_batch=900, n_ubatch=900)
    watched = Watched(monkeypatch, lambda: llm.eval(PROMPT))
    visits = 0
    while watched.thread.is_alive():
        with llm._engine.at_safe_point(patience_s=0.0):
            visits += 1
        time.sleep(0.05)
    watched.end()
    assert visits > 3
    assert watched.interrupted >= 3
    assert llm.n_tokens == llm._engine.ledger.count(LIVE) == len(PROMPT)
    assert_map_is_true(llm)


def test_what_is_trimmed_in_the_middle_of_a_prefill_is_given_up_and_the_rest_is_decoded(
    open_llm, monkeypatch
):
    llm = open_llm(SLOW, n_batch=400, n_ubatch=400)
    llm.eval(PROMPT[:400])
    watched = Watched(monkeypatch, lambda: llm.eval(PROMPT[400:800]))
    with llm._engine.at_safe_point(patience_s=0.0):
        evict(llm, (100, 300))
    watched.end()
    assert watched.interrupted == 1
    assert [list(run) for run in llm._engine.ledger.ranges(LOST)] == [[100, 300]]
    assert llm._engine.ledger.count(LIVE) == 600
    assert llm.n_tokens == 800
    assert_map_is_true(llm)
    llm.make_whole()
    assert_map_is_true(llm)


def test_outputs_that_are_wanted_together_are_made_together(open_llm, monkeypatch):
    llm = open_llm(SLOW, n_batch=500, n_ubatch=100, logits_all=True)
    whole = plain_twin(llm, n_batch=500, n_ubatch=100, logits_all=True)
    whole.eval(PROMPT[:500])
    watched = Watched(monkeypatch, lambda: llm.eval(PROMPT[:500]))
    time.sleep(0.15)  # some micro-batches are through
    for _ in range(2):
        with llm._engine.at_safe_point(patience_s=0.0):
            pass
    watched.end()
    assert watched.calls == [(500, 2), (500, 0)]  # and only once
    np.testing.assert_array_equal(llm.scores[:500], whole.scores[:500])
    assert_map_is_true(llm)
    whole.close()


def test_rows_that_an_interrupted_batch_wrote_go_back(open_llm, monkeypatch):
    llm = open_llm(SLOW, n_batch=900, n_ubatch=900)
    watched = Watched(monkeypatch, lambda: llm.eval(PROMPT))
    with llm._engine.at_safe_point(patience_s=0.0):
        written = llm._engine.track.map._written.sum()
        llm._engine.track.catch_up()
        assert llm._engine.track.map._written.sum() >= written
        llm._engine._release()
        assert llm._engine.track.map._written.sum() == len(llm._engine.ledger)
    watched.end()


def test_recomputing_makes_way_too_and_goes_on_later(open_llm, monkeypatch):
    llm = open_llm(SLOW, n_batch=900, n_ubatch=300)
    llm.eval(PROMPT)
    before = logits(llm)
    evict(llm, (50, 750))
    watched = Watched(monkeypatch, lambda: llm._engine.recompute(700))
    with llm._engine.at_safe_point(patience_s=0.0):
        assert_map_is_true(llm)
        assert llm._engine.ledger.count(LOST) > 0
        assert llm._engine.track.sequences.length() == len(PROMPT)  # the tail is back where it was
    watched.end()
    assert watched.interrupted == 1
    llm.make_whole()
    assert llm._engine.ledger.holes() == 0
    assert_map_is_true(llm)
    assert before.shape == logits(llm).shape


def test_whoever_has_the_context_already_is_not_interrupted(open_llm, monkeypatch):
    llm = open_llm()
    with llm._engine.at_safe_point():
        llm._tap.interrupt(True)
        llm.eval(PROMPT[:100])
        llm._tap.interrupt(False)
    assert llm.n_tokens == llm._engine.ledger.count(LIVE) == 100


def test_releasing_does_not_wait_for_a_prefill(open_llm, monkeypatch):
    llm = open_llm(SLOW, n_batch=450, n_ubatch=450)
    llm.eval(PROMPT[:450])
    llm._engine.trim([Range(100, 200)], None)
    llm._engine.track.map.stray(np.array([100, 101]))
    watched = Watched(monkeypatch, lambda: llm.eval(PROMPT[450:]))
    begin = time.monotonic()
    assert llm._engine.release() == 0
    assert time.monotonic() - begin < 0.15
    watched.end()
    assert watched.interrupted == 0
