"""Ctrl-C, closing and forgetting to close: no half-made change stays, no thread and no file."""

from __future__ import annotations

import gc
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from engine_help import (
    SMALL,
    assert_map_is_true,
    config,
    evict,
    greedy,
    logits_after,
    open_files,
    plain_twin,
    run_python,
    some_tokens,
    spill,
)
from llama_cpp import _internals
from models import LLAMA

from fakes import FakeSource
from psi_kv_governor import GovernedLlama
from psi_kv_governor.errors import EngineError
from psi_kv_governor.ledger import LOST, SPILLED

pytestmark = pytest.mark.llama
TOKENS = some_tokens(300)


def interrupt_after(monkeypatch, decodes: int) -> None:
    """Ctrl-C during the `decodes`-th decode from now on. Python raises it as soon as the C code returns."""
    real, seen = _internals.llama_cpp.llama_decode, []

    def decode(*arguments: object) -> int:
        done = real(*arguments)
        seen.append(1)
        if len(seen) == decodes:
            signal.raise_signal(signal.SIGINT)
        return done

    monkeypatch.setattr(_internals.llama_cpp, "llama_decode", decode)


@pytest.mark.parametrize("decodes", [1, 2, 3])
def test_ctrl_c_while_recomputing_loses_nothing(open_llm, monkeypatch, decodes):
    llm = open_llm(n_batch=32)
    twin = plain_twin(llm, n_batch=32)
    prompt = [*TOKENS, 5]
    greedy(llm, prompt, 1)
    expected = greedy(twin, prompt, 1)
    evict(llm, (20, 120))
    with monkeypatch.context() as patch:
        interrupt_after(patch, decodes)
        with pytest.raises(KeyboardInterrupt):
            llm.make_whole()
    assert_map_is_true(llm)
    assert llm._engine.ledger.count(LOST) == 100 - 32 * decodes  # what was decoded is kept
    assert greedy(llm, prompt, 1) == expected  # not from the logits of a recomputed token
    assert llm._engine.ledger.holes() == 0
    assert_map_is_true(llm)


@pytest.mark.parametrize("decodes", [1, 2, 5])
def test_ctrl_c_in_a_prompt_leaves_the_context_as_it_was(open_llm, monkeypatch, decodes):
    llm = open_llm(n_batch=32)
    twin = plain_twin(llm, n_batch=32)
    llm.eval(TOKENS), twin.eval(TOKENS)
    spill(llm, (20, 120))
    with monkeypatch.context() as patch:
        interrupt_after(patch, decodes)
        with pytest.raises(KeyboardInterrupt):
            llm.eval(some_tokens(200, seed=5))
    assert_map_is_true(llm)
    llm.governor.restore()
    llm.n_tokens = 300
    np.testing.assert_array_equal(logits_after(llm, 5), logits_after(twin, 5))


def test_ctrl_c_at_any_time_of_a_generation(open_llm):
    """A real signal at twenty random moments; each time the answer goes on where it was."""
    llm = open_llm(settings={"poll_s": 0.001, "poll_busy_s": 0.001}, auto=True)
    twin = plain_twin(llm)
    expected = greedy(twin, TOKENS, 400)
    text: list[int] = []
    main, random = threading.get_ident(), np.random.default_rng(0)
    interrupted = 0
    while len(text) < 400:
        timer = None
        if interrupted < 20:
            timer = threading.Timer(random.uniform(0.0, 0.01), signal.pthread_kill, (main, signal.SIGINT))
        try:
            if timer is not None:
                timer.start()  # it may fire in here already
            for token in llm.generate([*TOKENS, *text], temp=0.0):
                text.append(token)
                if len(text) == 400:
                    break
            if timer is not None:
                timer.join()
        except KeyboardInterrupt:
            interrupted += 1
    assert text == expected
    assert interrupted >= 5
    assert_map_is_true(llm)
    assert llm.governor.trim(1.0).spilled > 0
    assert llm.governor.restore().missing == 0


def test_closing_twice_is_closing_once(open_llm):
    files, threads = open_files(), threading.active_count()
    llm = open_llm(auto=True)
    llm.eval(TOKENS)
    spill(llm, (20, 120))
    llm.close()
    llm.close()
    assert threading.active_count() == threads
    assert open_files() == files
    status = llm.governor.status()
    assert status.store_bytes == 0
    with pytest.raises(EngineError, match="the model is closed"):
        llm.governor.trim()
    assert llm.governor.restore().cells == 0
    llm.governor.step()


def test_closing_only_the_governor_leaves_a_model_that_answers(open_llm):
    llm = open_llm(auto=True)
    twin = plain_twin(llm)
    llm.eval(TOKENS), twin.eval(TOKENS)
    with llm.governor:
        spill(llm, (20, 120))
    expected = twin.create_completion([*TOKENS, 5], max_tokens=8, temperature=0.0)["choices"]
    assert llm.create_completion([*TOKENS, 5], max_tokens=8, temperature=0.0)["choices"] == expected
    assert llm._engine.ledger.holes() == 0  # the store is gone, so they were recomputed
    assert_map_is_true(llm)


@pytest.mark.parametrize("in_a_cycle", [False, True])
def test_a_model_that_is_only_dropped_leaves_no_thread_and_no_file(tiny_model, folder, in_a_cycle):
    def use() -> None:
        llm = GovernedLlama(
            str(tiny_model(LLAMA)), config=config(store_dir=str(folder)), source=FakeSource(), **SMALL
        )
        llm.eval(TOKENS)
        llm.governor.trim(1.0)
        if in_a_cycle:
            llm.governor.subscribe(lambda event: llm.n_tokens)

    use()
    gc.collect()
    files, threads = open_files(), threading.active_count()
    for _ in range(3):
        use()
    gc.collect()
    assert (open_files(), threading.active_count()) == (files, threads)


@pytest.mark.parametrize("how", ["left open", "in a cycle", "in mid-trim"])
def test_a_process_that_never_closes_its_model_ends_all_the_same(tiny_model, folder, how):
    printed = run_python(
        """
import sys
from psi_kv_governor import GovernedLlama, GovernorConfig
sys.path[:0] = [sys.argv[2], sys.argv[2] + "/.."]
from engine_help import SMALL, config, some_tokens
from fakes import FakeSource
fast = {"poll_s": 0.001, "poll_busy_s": 0.001, "cooldown_s": 0, "quiet_s": 0, "budget_per_min": 1e9}
llm = GovernedLlama(sys.argv[1], config=config(store_dir=sys.argv[3], **fast), source=FakeSource(), **SMALL)
llm.eval(some_tokens(300))
llm.governor.trim(0.5)
if sys.argv[4] == "in a cycle":
    llm.itself = llm
if sys.argv[4] == "in mid-trim":
    import itertools, threading, time
    class Alternating(FakeSource):
        def read(self):
            self.stall = float(self.reads % 2)
            return super().read()
    llm.governor._sensor.source = Alternating()
    time.sleep(0.2)
print("end of the script")
""",
        tiny_model(LLAMA),
        Path(__file__).parent,
        folder,
        how,
        timeout_s=20,
    )
    assert printed == "end of the script\n"


def test_a_trim_by_hand_outlives_the_ctrl_c_that_came_with_it(open_llm):
    """Half a trim would be worse than a whole one: it is finished in another thread."""
    llm = open_llm()
    llm.eval(TOKENS)
    put = llm.governor._store.put

    def put_and_interrupt(*arguments):
        signal.pthread_kill(main, signal.SIGINT)
        time.sleep(0.05)
        return put(*arguments)

    main = threading.get_ident()
    llm.governor._store.put = put_and_interrupt
    with pytest.raises(KeyboardInterrupt):
        llm.governor.trim(1.0)
    llm.governor._store.put = put
    assert llm.governor.restore().missing == 0  # waits for it
    assert llm._engine.ledger.count(SPILLED) == 0
    assert_map_is_true(llm)
