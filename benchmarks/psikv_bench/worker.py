"""The process that holds a model, with the orders of the benchmarks: `python -m psikv_bench.worker SETUP`."""

from __future__ import annotations

import hashlib
import os
import select
import sys
import threading
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

from psi_kv_governor.errors import PsiKvError
from psi_kv_governor.sandbox import llm as llms
from psi_kv_governor.sandbox import worker
from psi_kv_governor.sandbox.host import drop_file_cache
from psi_kv_governor.sandbox.text import prompt_tokens
from psi_kv_governor.sandbox.worker import say
from psikv_bench import llm as states
from psikv_bench import messages
from psikv_bench.messages import Setup
from psikv_bench.process_memory import governor_cpu_s, own_memory
from psikv_bench.reference import MiddlePruner

_LOOK_S = 0.02
_WHOLE_TIMEOUT_S = 20.0


class Worker(worker.Worker):
    """One process of the model."""

    setup: Setup

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self._probe = 0
        self._prompt: list[int] = []
        self._going_on: Callable[[messages.Order], None] = lambda order: None
        self._pruner: MiddlePruner | None = None
        if setup.variant == "reference":
            file, keep, tail = Path(setup.pressure_file), setup.keep or 0, setup.tail or 1
            self._pruner = MiddlePruner(file, keep, tail, setup.min_prune)

    def actions(self) -> worker.Actions:
        return {
            **super().actions(),
            messages.Fill: self._fill,
            messages.DecodeOn: self._decode_on,
            messages.Prefill: self._prefill_on,
            messages.Generate: self._generate,
            messages.Stop: self._stop,
            messages.Restore: self._restore,
            messages.Whole: self._whole,
            messages.Save: self._save,
            messages.Look: self._look,
        }

    def open(self) -> None:
        super().open()
        if self.setup.governed:
            self.llm.governor.observe(self._on_turn)

    def opened(self) -> messages.Opened:
        return messages.Opened(
            cell_bytes=states.cell_bytes(self.llm),
            digest=self._digest() if self.setup.context_tokens else "",
            memory=own_memory(),
        )

    # -- the context ------------------------------------------------------------------------------------

    def fill_context(self) -> None:
        base = self.setup.context_tokens
        if not base:
            return
        tokens = prompt_tokens(self.llm, base + 1 + self.setup.prompt_tokens)
        self._probe, self._prompt = tokens[base], tokens[base + 1 :]
        if self.setup.state:
            states.load_state(self.llm, self.setup.state, tokens[:base])
            drop_file_cache(self.setup.state)
        else:
            self.read(tokens[:base], self.setup.batch_tokens)

    def _fill(self, order: messages.Fill) -> None:
        begin = int(self.llm.n_tokens)
        self.read(prompt_tokens(self.llm, begin + order.tokens)[begin:], order.chunk)

    def _save(self, order: messages.Save) -> None:
        states.save_state(self.llm, order.path, self.setup.context_tokens)
        with open(order.path, "rb") as file:
            os.fdatasync(file)  # only what is on the disk can be forgotten
        drop_file_cache(order.path)

    def _digest(self) -> str:
        """Of the logits after the context and the probe, which is taken out again by the next decode."""
        self.llm.eval([self._probe])
        self.llm.n_tokens = self.setup.context_tokens
        return hashlib.sha256(llms.logits_of(self.llm).tobytes()).hexdigest()[:16]

    # -- what goes on -----------------------------------------------------------------------------------

    def _ordered(self) -> bool:
        """Whether the next order has come, or none will."""
        return bool(select.select([self.orders], [], [], 0)[0])

    def _decode_on(self, order: messages.Order) -> None:
        """Token after token, and back to the end of the context in time."""
        self._going_on = self._decode_on
        last_s = time.monotonic()
        while not self._ordered():
            if self.llm.n_tokens >= self.setup.context_tokens + self.setup.decoded_tokens:
                self.llm.n_tokens = self.setup.context_tokens  # the next decode takes out what comes after
            last_s = self.eval([llms.greedy(self.llm)], last_s)

    def _prefill_on(self, order: messages.Order) -> None:
        self._going_on = self._prefill_on
        last_s = time.monotonic()
        while True:
            self.llm.n_tokens = self.setup.context_tokens
            for start in range(0, len(self._prompt), self.setup.batch_tokens):
                if self._ordered():
                    return
                last_s = self.eval(self._prompt[start : start + self.setup.batch_tokens], last_s)

    def _stop(self, order: messages.Stop) -> messages.Stopped:
        self._going_on = lambda order: None
        return messages.Stopped()

    def _restore(self, order: messages.Restore) -> None:
        threading.Thread(target=self.llm.governor.restore, daemon=True).start()
        self._going_on(order)

    def _generate(self, order: messages.Generate) -> None:
        context = self.setup.context_tokens
        self.llm.n_tokens = min(int(self.llm.n_tokens), context - order.again)
        request = self.llm.generate(self.llm.input_ids[:context].tolist(), temp=0.0)
        decoded = sum(1 for _ in islice(request, order.tokens))
        request.close()
        if decoded != order.tokens:
            raise PsiKvError(f"the model stopped after {decoded} of {order.tokens} tokens")

    def next_token(self, order: messages.Decode) -> int:
        if order.stage == "pressed" and self._pruner is not None:
            pruned = self._pruner.prune(self.llm)
            if pruned is not None:
                say(messages.Governed(event=pruned, live_cells=self.cells().live))
        return super().next_token(order)

    # -- afterwards -------------------------------------------------------------------------------------

    def cells(self) -> llms.Cells:
        found = super().cells()
        removed = 0 if self._pruner is None else self._pruner.removed_cells
        return found._replace(live=found.live - removed, lost=found.lost + removed)

    def _whole(self, order: messages.Whole) -> messages.Checked:
        """Ask until everything is back: right after the pressure, the governor still holds."""
        until_s = time.monotonic() + _WHOLE_TIMEOUT_S
        states.cut(self.llm, self.setup.context_tokens)
        digest = ""
        missing = self.put_back()
        while time.monotonic() < until_s:
            if not missing:
                digest = self._digest()
            missing = self.put_back()
            if not missing and digest:  # nothing went while the digest was made
                return messages.Checked(missing_cells=0, digest=digest)
            time.sleep(_LOOK_S)
        return messages.Checked(missing_cells=missing, digest="")

    def _look(self, order: messages.Look) -> messages.Looked:
        cells = self.cells()
        return messages.Looked(
            memory=own_memory(),
            live_cells=cells.live,
            masked_cells=cells.masked,
            lost_cells=cells.lost,
            governor_cpu_s=governor_cpu_s(),
        )

    def _on_turn(self, turn: Any) -> None:
        """Says those of the governor's turns that are not calm."""
        reading, decision = turn.reading, turn.decision
        if decision.mode.value == "calm" and decision.action.value == "none" and not reading.some:
            return
        say(
            messages.Turned(
                time_s=reading.time_s,
                some=reading.some,
                headroom_bytes=reading.headroom_bytes,
                live_bytes=turn.cache.live_bytes,
                action=decision.action.value,
                reason=decision.reason,
            )
        )


if __name__ == "__main__":
    sys.exit(worker.main(Worker, Setup))
