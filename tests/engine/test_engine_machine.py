"""Anything in any order on a real context: a live position has the rows that were decoded for it, always."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
from engine_help import assert_map_is_true, rows_at, some_tokens
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from psi_kv_governor.engine.llama import engine as engine_module
from psi_kv_governor.engine.llama.context import Sequences
from psi_kv_governor.errors import BlobCorruptError
from psi_kv_governor.ledger import LIVE, LOST, SPILLED
from psi_kv_governor.policy.base import Range

pytestmark = pytest.mark.llama
N_CTX = 256
shares = st.floats(0.0, 1.0)


class EngineMachine(RuleBasedStateMachine):
    """One context and its store, driven as Llama and the governor drive them."""

    def __init__(self, llm) -> None:
        super().__init__()
        self.llm, self.engine, self.store = llm, llm._engine, llm.governor._store
        self.llm.reset()
        self.llm._ctx.kv_cache_clear()
        self.rows: list[bytes] = []
        """The rows of each position as they were right after its decode."""
        self.buffer = (ctypes.c_uint8 * (1 << 22))()
        self.damaged: set[int] = set()
        """Keys of blobs that were changed on disk."""
        self.recomputed: list[Range] = []
        """Lost positions that were decoded again, since `remember`."""

    def length(self) -> int:
        return len(self.engine.ledger)

    def run(self, a: float, b: float) -> Range:
        start, stop = sorted((round(a * self.length()), round(b * self.length())))
        return Range(start, stop)

    def remember(self, *decoded: Range) -> None:
        for part in (*decoded, *self.recomputed):
            for p in range(*part):
                self.rows[p : p + 1] = [rows_at(self.llm, p)]
        self.recomputed.clear()

    @precondition(lambda self: self.length() < N_CTX)
    @rule(n=st.integers(1, 70), seed=st.integers(0, 9))
    def decode(self, n, seed):
        start = self.length()
        n = min(n, N_CTX - start)
        self.llm.eval(some_tokens(n, seed))  # puts back what is missing right before, if it is
        self.remember(Range(start, start + n))

    @rule(share=shares)
    def truncate(self, share):
        self.llm.n_tokens = round(share * self.length())
        self.llm._ctx.kv_cache_seq_rm(-1, self.llm.n_tokens, -1)
        del self.rows[self.llm.n_tokens :]

    @precondition(lambda self: self.length() > 1)
    @rule(a=shares, b=shares)
    def spill(self, a, b):
        run = self.run(a, b)
        last = Range(self.length() - 1, self.length())
        live, last_live = self.engine.ledger.count(LIVE), self.engine.ledger.holes(last) == 0
        result = self.engine.trim([run], self.store)
        assert (result.spilled, result.problem) == (result.cells, "")
        assert self.engine.ledger.count(LIVE) == live - result.cells
        assert (self.engine.ledger.holes(last) == 0) == last_live

    @precondition(lambda self: self.length() > 1)
    @rule(a=shares, b=shares)
    def evict(self, a, b):
        result = self.engine.trim([self.run(a, b)], None)
        assert result.spilled == 0

    @rule(share=shares, worth=st.sampled_from([None, lambda part: part.start, lambda part: -part.start]))
    def restore(self, share, worth):
        spilled = self.engine.ledger.count(SPILLED)
        most = round(share * spilled)
        result = self.engine.restore(most, self.store, worth)
        if not self.damaged:
            assert (result.cells, result.problem) == (most, "")
            assert self.engine.ledger.count(SPILLED) == spilled - most
        self.damaged &= set(self.store._blobs)

    @rule(n=st.integers(1, 100))
    def recompute(self, n):
        lost = next(self.engine.ledger.ranges(LOST), None)
        possible = lost is not None and self.engine.ledger.holes(Range(0, lost.start)) == 0
        done = self.engine.recompute(n)
        assert done == (min(n, lost.cells, self.llm.n_batch) if possible else 0)
        self.remember()

    @rule()
    def release(self):
        self.engine.release()
        assert self.engine.release() == 0

    @precondition(lambda self: self.store._blobs)
    @rule(data=st.data())
    def damage_a_blob(self, data):
        key = data.draw(st.sampled_from(sorted(self.store._blobs)))
        self.damaged.add(key)

    @precondition(lambda self: self.length() and self.engine.ledger.holes() == 0)
    @rule()
    def save_and_load(self):
        state = self.llm.save_state()
        self.llm.reset()
        self.llm.eval([5, 6, 7])
        self.llm.load_state(state)
        assert self.engine.ledger.count(LIVE) == self.length() == self.llm.n_tokens

    @precondition(lambda self: self.length() > 1)
    @rule(a=shares, b=shares)
    def remove_by_hand(self, a, b):
        run = self.run(a, b)
        assert self.llm._ctx.kv_cache_seq_rm(0, run.start, min(run.stop, self.length() - 1))

    @rule()
    def clear(self):
        self.llm.reset()
        self.llm._ctx.kv_cache_clear()
        self.rows.clear()

    @invariant()
    def live_positions_have_their_rows(self):
        assert self.length() == self.llm.n_tokens == len(self.rows)
        for run in self.engine.ledger.ranges(LIVE):
            for p in range(*run):
                assert rows_at(self.llm, p) == self.rows[p], p
        assert_map_is_true(self.llm)

    @invariant()
    def llama_cpp_holds_what_the_ledger_says(self):
        ledger = self.engine.ledger
        assert self.held(Sequences.MAIN) == ledger.count(LIVE)
        assert self.held(Sequences.PARKED) == ledger.count(SPILLED)
        assert self.held(Sequences.SCRATCH) == 0
        end = next(reversed(list(ledger.ranges(LIVE))), Range(0, 0)).stop
        assert self.engine.track.sequences.length() == end

    def held(self, sequence: int) -> int:
        """Number of cells of a sequence, by the size of its saved state."""
        sequences = self.engine.track.sequences
        overhead = len(sequences.saved(Sequences.SCRATCH, self.buffer))
        n_bytes = len(sequences.saved(sequence, self.buffer))
        if n_bytes == overhead:
            return 0
        tensors = self.engine._rows.tensors
        # Per cell 12 bytes of metadata; per tensor its type and row size; how many layers, and V's order.
        n_bytes -= overhead + 12 * len(tensors) + 8
        cells, rest = divmod(n_bytes, self.engine.cell_bytes + 12)
        assert rest == 0
        return cells

    @invariant()
    def the_store_holds_what_is_parked(self):
        parked = self.engine._parking._parked
        assert sorted(entry.key for entry in parked) == sorted(self.store._blobs)
        spilled = [p for run in self.engine.ledger.ranges(SPILLED) for p in range(*run)]
        assert spilled == [p for entry in parked for p in range(*entry.wanted)]


@pytest.mark.parametrize("kind", ["f16", "q8_0"])
def test_any_order_of_steps(open_llm, monkeypatch, kind):
    import llama_cpp

    type_kv = {"f16": llama_cpp.GGML_TYPE_F16, "q8_0": llama_cpp.GGML_TYPE_Q8_0}[kind]
    # A batch smaller than the holes, a micro-batch smaller than the batch, several blobs a hole.
    llm = open_llm(n_ctx=N_CTX, n_batch=48, n_ubatch=16, type_k=type_kv, type_v=type_kv)
    monkeypatch.setattr(engine_module, "_BLOB_BYTES", 40 * llm._engine.cell_bytes)
    machines = []

    def machine() -> EngineMachine:
        machines[:] = [EngineMachine(llm)]
        return machines[0]

    get, decode = llm.governor._store.get, llm._engine._decoding._run

    def get_checked(key, tag, buffers):
        if key in machines[0].damaged:
            for buffer in buffers:  # what a reader may leave behind when the checksum is found wrong
                buffer[:] = bytes(np.full(len(buffer), 0xEE, dtype=np.uint8))
            raise BlobCorruptError("it was changed on disk")
        get(key, tag, buffers)

    def decode_noted(tokens, start):
        machines[0].recomputed.append(Range(start, start + len(tokens)))
        decode(tokens, start)

    monkeypatch.setattr(llm.governor._store, "get", get_checked)
    monkeypatch.setattr(llm._engine._decoding, "_run", decode_noted)
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=60,
            stateful_step_count=20,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
