"""The process that holds a model: opens it, and does what it is ordered to.

    python -m psikv_bench.worker '{"variant": "psi", "model": "model.gguf"}'

Its one argument is a Setup. Orders come in on standard input, each the name of a method with its arguments
(`Host.order`); messages go out on standard output. It ends with its standard input, or when nobody reads what
it says.
"""

from __future__ import annotations

import hashlib
import math
import os
import select
import sys
import threading
import time
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import msgspec

from psi_kv_governor.errors import PsiKvError
from psi_kv_governor.events import Event
from psi_kv_governor.sandbox.llm import exit_status, greedy, logits_of, put_back
from psi_kv_governor.sandbox.sandbox import drop_file_cache
from psi_kv_governor.sandbox.text import prompt_tokens
from psikv_bench import llm as models
from psikv_bench import messages
from psikv_bench.messages import Setup
from psikv_bench.process_memory import governor_cpu_s, own_memory
from psikv_bench.reference import MiddlePruner

_LOOK_S = 0.02
_WHOLE_TIMEOUT_S = 60.0
"""It takes the governor a quiet reading, which a busy machine may owe it for a while."""


def say(message: messages.Message) -> None:
    """Write one, from any thread: a pipe takes a line whole. Raises BrokenPipeError where nobody reads."""
    os.write(sys.stdout.fileno(), msgspec.json.encode(message) + b"\n")


class Worker:
    """One process of the model."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.llm: Any = None
        self._orders = open(0, "rb", buffering=0, closefd=False)  # noqa: SIM115  # unbuffered: it can be polled
        self._probe = 0
        self._prompt: list[int] = []
        self._going_on: Callable[[], None] = lambda: None
        self._pruner: MiddlePruner | None = None
        if setup.variant == "reference":
            file, keep, tail = Path(setup.pressure_file), setup.keep or 0, setup.tail or 1
            self._pruner = MiddlePruner(file, keep, tail, setup.min_prune)

    def run(self) -> None:
        """Open, then carry out orders until nobody gives any more."""
        say(messages.Progress(stage="load", done=0, total=1))
        self.llm = models.opened(self.setup)
        try:
            if self.setup.governed:
                self.llm.governor.subscribe(self._on_event)
                self.llm.governor.observe(self._on_turn)
            self._fill_context()
            say(self._opened())
            while line := self._orders.readline():
                name, given = msgspec.json.decode(line)
                began_s, cpu_began_s = time.perf_counter(), time.process_time()
                answer = getattr(self, name)(**given)
                seconds, cpu_s = time.perf_counter() - began_s, time.process_time() - cpu_began_s
                say(answer or messages.Done(seconds=seconds, cpu_s=cpu_s))
        finally:
            self.llm.close()

    def _opened(self) -> messages.Opened:
        return messages.Opened(
            cell_bytes=models.cell_bytes(self.llm),
            digest=self._digest() if self.setup.context_tokens else "",
            memory=own_memory(),
        )

    # -- the context ------------------------------------------------------------------------------------

    def _fill_context(self) -> None:
        base = self.setup.context_tokens
        if not base:
            return
        tokens = prompt_tokens(self.llm, base + 1 + self.setup.prompt_tokens)
        self._probe, self._prompt = tokens[base], tokens[base + 1 :]
        if self.setup.state:
            models.load_state(self.llm, self.setup.state, tokens[:base])
            drop_file_cache(self.setup.state)
        else:
            self._read(tokens[:base], self.setup.batch_tokens)

    def _read(self, tokens: Sequence[int], chunk: int) -> None:
        """Decode `tokens` in chunks."""
        for start in range(0, len(tokens), chunk):
            say(messages.Progress(stage="prefill", done=start, total=len(tokens)))
            self._eval(tokens[start : start + chunk], time.monotonic())
        say(messages.Progress(stage="prefill", done=len(tokens), total=len(tokens)))

    def _eval(self, tokens: Sequence[int], since_s: float) -> float:
        """Decode `tokens` at once; gives when it was done."""
        self.llm.eval(list(tokens))
        now_s = time.monotonic()
        say(messages.Token(time_s=now_s, seconds=now_s - since_s, tokens=len(tokens)))
        return now_s

    def fill(self, tokens: int, chunk: int) -> None:
        """Decode so many more tokens of the text. Says Token for each chunk."""
        begin = int(self.llm.n_tokens)
        self._read(prompt_tokens(self.llm, begin + tokens)[begin:], chunk)

    def save(self, path: str) -> None:
        """Write the context to a file."""
        models.save_state(self.llm, path, self.setup.context_tokens)
        with open(path, "rb") as file:
            os.fdatasync(file)  # only what is on the disk can be forgotten
        drop_file_cache(path)

    def _digest(self) -> str:
        """Of the logits after the context and the probe, which is taken out again by the next decode."""
        self.llm.eval([self._probe])
        self.llm.n_tokens = self.setup.context_tokens
        return hashlib.sha256(logits_of(self.llm).tobytes()).hexdigest()[:16]

    # -- tokens -----------------------------------------------------------------------------------------

    def decode(
        self, tokens: int, stage: messages.Stage = "pressed", max_s: float = math.inf, trim_at: int = -1
    ) -> None:
        """Greedily, past any end of text: what counts is the time, not the story. Says Token for each.

        Before token number `trim_at` half of what may go is trimmed.
        """
        say(messages.Progress(stage=stage, done=0, total=tokens))
        began_s = last_s = time.monotonic()
        for number in range(tokens):
            if number == trim_at and self.setup.governed:
                self.llm.governor.trim(0.5)
                last_s = time.monotonic()
            if stage == "pressed":
                self._prune()
            last_s = self._eval([greedy(self.llm)], last_s)
            if last_s - began_s > max_s:
                return

    def _prune(self) -> None:
        """What the reference does before a token."""
        if self._pruner is not None and (pruned := self._pruner.prune(self.llm)) is not None:
            say(messages.Governed(event=pruned, live_cells=self._cells().live))

    def _ordered(self) -> bool:
        """Whether the next order has come, or none will."""
        return bool(select.select([self._orders], [], [], 0)[0])

    def decode_on(self) -> None:
        """Token after token until the next order, and back to the end of the context in time."""
        self._going_on = self.decode_on
        last_s = time.monotonic()
        while not self._ordered():
            if self.llm.n_tokens >= self.setup.context_tokens + self.setup.decoded_tokens:
                self.llm.n_tokens = self.setup.context_tokens  # the next decode takes out what comes after
            last_s = self._eval([greedy(self.llm)], last_s)

    def prefill(self) -> None:
        """Decode the same long prompt after the context, again and again, until the next order."""
        self._going_on = self.prefill
        last_s = time.monotonic()
        while True:
            self.llm.n_tokens = self.setup.context_tokens
            for start in range(0, len(self._prompt), self.setup.batch_tokens):
                if self._ordered():
                    return
                last_s = self._eval(self._prompt[start : start + self.setup.batch_tokens], last_s)

    def stop(self) -> messages.Stopped:
        """No longer go on with anything."""
        self._going_on = lambda: None
        return messages.Stopped()

    def restore(self) -> None:
        """Put back what can be put back beside what goes on. Only the governor's event tells of it."""
        threading.Thread(target=self.llm.governor.restore, daemon=True).start()
        self._going_on()

    def generate(self, tokens: int, again: int) -> None:
        """A whole request of so many tokens on the prompt that is in the cache, as users make one.

        Of the prompt's last tokens so many are decoded `again`.
        """
        context = self.setup.context_tokens
        self.llm.n_tokens = min(int(self.llm.n_tokens), context - again)
        request = self.llm.generate(self.llm.input_ids[:context].tolist(), temp=0.0)
        decoded = sum(1 for _ in islice(request, tokens))
        request.close()
        if decoded != tokens:
            raise PsiKvError(f"the model stopped after {decoded} of {tokens} tokens")

    # -- afterwards -------------------------------------------------------------------------------------

    def _cells(self) -> models.Cells:
        """Where those of the context are."""
        found = models.cells_of(self.llm, plain=self.setup.plain)
        removed = 0 if self._pruner is None else self._pruner.removed_cells
        return found._replace(live=found.live - removed, lost=found.lost + removed)

    def settle(self, max_s: float) -> messages.Looked:
        """Wait so long for what is away, then ask for it."""
        say(messages.Progress(stage="restore", done=0, total=1))
        until_s = time.monotonic() + max_s
        while (cells := self._cells()).masked and time.monotonic() < until_s:
            time.sleep(_LOOK_S)
        if cells.masked + cells.lost:
            self._put_back()
        return self.look()

    def _put_back(self) -> int:
        """Ask for all that is away; gives the cells that stay away."""
        return put_back(self.llm) if self.setup.governed else 0

    def whole(self) -> messages.Checked:
        """Cut off what was decoded, have everything back, and look at the logits.

        It is asked for until it is there: right after the pressure, the governor still holds.
        """
        until_s = time.monotonic() + _WHOLE_TIMEOUT_S
        models.cut(self.llm, self.setup.context_tokens)
        digest = ""
        missing = self._put_back()
        while time.monotonic() < until_s:
            if not missing:
                digest = self._digest()
            missing = self._put_back()
            if not missing and digest:  # nothing went while the digest was made
                return messages.Checked(missing_cells=0, digest=digest)
            time.sleep(_LOOK_S)
        return messages.Checked(missing_cells=missing, digest="")

    def look(self) -> messages.Looked:
        """At the process, as it is now."""
        cells = self._cells()
        return messages.Looked(
            memory=own_memory(),
            live_cells=cells.live,
            masked_cells=cells.masked,
            lost_cells=cells.lost,
            governor_cpu_s=governor_cpu_s(),
        )

    def _on_event(self, event: Event) -> None:
        say(messages.Governed(event=event, live_cells=self._cells().live))

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
    sys.exit(exit_status(Worker(msgspec.json.decode(sys.argv[1], type=Setup)).run))
