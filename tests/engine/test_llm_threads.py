"""The governor acts in its own thread while tokens are decoded, and neither waits for the other for long."""

from __future__ import annotations

import threading
import time

import msgspec
import numpy as np
import pytest
from engine_help import assert_map_is_true, logits_after, plain_twin, rows_at, some_tokens

from fakes import FakeSource
from psi_kv_governor.errors import EngineError
from psi_kv_governor.events import Restored, Trimmed
from psi_kv_governor.ledger import LIVE

pytestmark = [pytest.mark.llama, pytest.mark.timeout(60)]

RESTLESS = {
    "poll_s": 0.001,
    "poll_busy_s": 0.001,
    "cooldown_s": 0.0,
    "cooldown_acute_s": 0.0,
    "futile_trims": 10**6,
    "quiet_s": 0.0,
    "budget_per_min": 1e6,
    "step_min": 0.3,
    "step_max": 0.6,
}
"""Acts at every turn, a thousand times a second."""


class Alternating(FakeSource):
    """Stalls for some readings, and is calm for as many."""

    def __init__(self, readings: int) -> None:
        super().__init__()
        self._readings = readings

    def read(self):
        self.stall = float(self.reads // self._readings % 2)
        # Of a moment: of half a second most would be taken off as the governor's own doing.
        return msgspec.structs.replace(super().read(), interval_s=1e-6)


def counted(llm) -> dict[type, int]:
    """Counts the cells of what happens, by the kind of event."""
    cells: dict[type, int] = {Trimmed: 0, Restored: 0}

    def count(event) -> None:
        if type(event) in cells:
            cells[type(event)] += event.cells

    llm.governor.subscribe(count)
    return cells


@pytest.mark.parametrize("readings", [1, 7])
def test_tokens_are_decoded_while_everything_comes_and_goes(open_llm, readings):
    llm = open_llm(settings=RESTLESS, source=Alternating(readings), n_ctx=2048)
    llm.eval(some_tokens(400))
    cells = counted(llm)
    llm.governor.start()
    for token in some_tokens(1000, seed=1):
        llm.eval([token])
    llm.governor.close()
    assert cells[Trimmed] > 1000
    assert cells[Restored] > 500
    assert llm.make_whole() == 0  # spilled when the loop ended: the store is closed, so recomputed
    assert len(llm._engine.ledger) == llm._engine.ledger.count(LIVE) == 1400
    assert_map_is_true(llm)


@pytest.mark.parametrize("readings", [1, 7])
def test_what_was_decoded_before_the_first_hole_is_untouched_at_the_end(open_llm, readings):
    llm = open_llm(settings=RESTLESS, source=Alternating(readings), n_ctx=2048)
    twin = plain_twin(llm, n_ctx=2048)
    prompt = some_tokens(400)
    llm.eval(prompt), twin.eval(prompt)
    rows = [rows_at(llm, p) for p in range(400)]
    cells = counted(llm)
    llm.governor.start()
    for token in some_tokens(300, seed=1):
        llm.eval([token])
        time.sleep(0.0005)
    llm.governor._sensor.source = calm = FakeSource()
    end = time.monotonic() + 20
    # Three readings: what the last stall led to is done by then.
    while (calm.reads < 3 or cells[Trimmed] != cells[Restored]) and time.monotonic() < end:
        time.sleep(0.01)  # an event follows what it tells of
    assert cells[Trimmed] == cells[Restored] > 500
    assert llm._engine.ledger.holes() == 0
    assert [rows_at(llm, p) for p in range(400)] == rows
    llm.n_tokens = 400
    np.testing.assert_array_equal(logits_after(llm, 5), logits_after(twin, 5))
    assert_map_is_true(llm)


def test_requests_are_answered_while_everything_comes_and_goes(open_llm):
    llm = open_llm(settings=RESTLESS, source=Alternating(3), n_ctx=2048, n_batch=64)
    llm.governor.start()
    random = np.random.default_rng(0)
    prompt, noted = some_tokens(600), 0
    for turn in range(25):
        cut = int(random.integers(100, 600))
        request = [*prompt[:cut], *some_tokens(20, seed=turn)]
        answer = llm.create_completion(request, max_tokens=30, temperature=0.0)
        noted += "psi_kv" in answer
        assert len(llm._engine.ledger) == llm.n_tokens
    llm.governor.close()
    assert noted > 5
    assert llm.make_whole() == 0
    assert_map_is_true(llm)


def test_states_are_saved_and_loaded_while_everything_comes_and_goes(open_llm):
    llm = open_llm(settings=RESTLESS, source=Alternating(2))
    prompt = some_tokens(300)
    llm.eval(prompt)
    rows = [rows_at(llm, p) for p in range(300)]
    llm.governor.start()
    saved, end = 0, time.monotonic() + 30
    while saved < 10 and time.monotonic() < end:
        try:
            state = llm.save_state()
        except EngineError:
            continue  # under pressure right now
        saved += 1
        llm.load_state(state)
        assert len(llm._engine.ledger) == llm.n_tokens == 300
    llm.governor._sensor.source = FakeSource()
    llm.governor.close()
    assert saved == 10
    assert llm.governor._engine.capabilities.spill.able
    if llm._engine.ledger.holes() == 0:
        assert [rows_at(llm, p) for p in range(300)] == rows
    assert llm.make_whole() == 0
    assert_map_is_true(llm)


def test_a_trim_waits_for_one_decode_and_not_for_the_whole_prompt(open_llm):
    llm = open_llm(n_ctx=4096, n_batch=32)
    llm.eval(some_tokens(300))
    waited = []

    def trim() -> None:
        begin = time.monotonic()
        llm.governor.trim(0.5)
        waited.append(time.monotonic() - begin)

    begin = time.monotonic()
    thread = threading.Thread(target=trim)
    thread.start()
    llm.eval(some_tokens(3500, seed=1))
    prompt_s = time.monotonic() - begin
    thread.join()
    assert waited[0] < prompt_s / 4
    assert llm._engine.track.affected() > 0


def test_several_threads_may_act_by_hand_at_once(open_llm):
    llm = open_llm()
    llm.eval(some_tokens(500))
    rows = [rows_at(llm, p) for p in range(500)]

    def act(seed: int) -> None:
        random = np.random.default_rng(seed)
        for _ in range(40):
            if random.random() < 0.5:
                llm.governor.trim(float(random.random()))
            else:
                llm.governor.restore(int(random.integers(0, 300)))
            llm.governor.status()

    threads = [threading.Thread(target=act, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert llm.governor.restore().missing == 0
    assert [rows_at(llm, p) for p in range(500)] == rows
    assert_map_is_true(llm)
