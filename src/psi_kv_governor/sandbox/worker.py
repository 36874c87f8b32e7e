"""The process that holds a model: opens it, and does what it is ordered to (`messages`).

    python -m psi_kv_governor.sandbox.worker '{"variant": "psi", "model": "model.gguf"}'

Its one argument is a Setup. Orders come in on standard input, messages go out on standard output. It ends
with its standard input.
"""

from __future__ import annotations

import hashlib
import os
import queue
import sys
import threading
import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import msgspec

from psi_kv_governor.errors import PsiKvError
from psi_kv_governor.events import Event
from psi_kv_governor.sandbox import llm as llms
from psi_kv_governor.sandbox import messages
from psi_kv_governor.sandbox.messages import Setup, Stage
from psi_kv_governor.sandbox.process_memory import own_memory
from psi_kv_governor.sandbox.reference import MiddlePruner
from psi_kv_governor.sandbox.self_look import drop_file_cache, looked
from psi_kv_governor.sandbox.speaker import Speaker
from psi_kv_governor.sandbox.text import prompt_tokens

_LOOK_S = 0.02
_WHOLE_TIMEOUT_S = 20.0
_SETTLE_S = 0.1
"""libgomp's idle threads spin for about 8 ms; after this none does."""


class _Abandoned(Exception):
    """Nobody listens any more."""


class Worker:
    """One process of the model."""

    def __init__(self, setup: Setup, speaker: Speaker) -> None:
        self._setup, self._speaker = setup, speaker
        self._orders: queue.SimpleQueue[messages.Order | None] = queue.SimpleQueue()
        self._abandoned = threading.Event()
        self._llm: Any = None
        self._probe = 0
        self._prompt: list[int] = []
        self._turns = 0
        self._pruner: MiddlePruner | None = None
        if setup.variant == "reference":
            file, keep, tail = Path(setup.pressure_file), setup.keep or 0, setup.tail or 1
            self._pruner = MiddlePruner(file, keep, tail, setup.min_prune)

    def run(self) -> None:
        """Open, then carry out orders until nobody speaks any more."""
        threading.Thread(target=self._listen, daemon=True).start()
        setup = self._setup
        self._speaker.say(messages.Progress(stage="load", done=0, total=1))
        llms.llama_class(setup.variant)
        imported = own_memory()
        self._llm = llms.open_llm(setup, setup.cells, setup.prefill_threads or os.cpu_count() or 1)
        try:
            if llms.is_governed(setup.variant):
                llms.follow(self._llm, self._on_event, self._on_turn, self._speaker.say)
            self._fill_context()
            opened = messages.Opened(
                cell_bytes=llms.cell_bytes(self._llm),
                digest=self._digest() if setup.context_tokens else "",
                imported=imported,
                memory=own_memory(),
            )
            self._speaker.say(opened)
            while (order := self._orders.get()) is not None:
                self._do(order)
        finally:
            self._llm.close()

    def _listen(self) -> None:
        """Orders come in here, so that one can come while a token is decoded."""
        decoder = msgspec.json.Decoder(messages.Order)
        try:
            for line in sys.stdin.buffer:
                order = decoder.decode(line)
                if not isinstance(order, messages.Restore):
                    self._orders.put(order)
                elif self._llm is not None:
                    self._llm.governor.restore()
        finally:
            self._abandoned.set()
            self._orders.put(None)

    def _do(self, order: messages.Order) -> None:
        match order:
            case messages.Decode(tokens=None):
                self._decode_on()
            case messages.Prefill():
                self._prefill_on()
            case messages.Stop():
                self._speaker.say(messages.Stopped())
            case messages.Settle():
                self._speaker.say(self._settle(order.max_s))
            case messages.Whole():
                self._speaker.say(self._whole())
            case messages.Look():
                self._speaker.say(looked(self._cells(), self._turns))
            case _:
                self._timed(order)

    def _timed(self, order: messages.Order) -> None:
        """The orders that end by themselves, and say how long they took."""
        if isinstance(order, messages.Generate):
            time.sleep(_SETTLE_S)
        began_s, cpu_began_s = time.perf_counter(), time.process_time()
        match order:
            case messages.Fill():
                self._fill(order.tokens, order.chunk)
            case messages.Decode():
                self._decode(order)
            case messages.Generate():
                self._generate(order.tokens, order.again)
            case messages.Trim():
                self._llm.governor.trim(order.fraction)
            case messages.Save():
                llms.save_state(self._llm, order.path, self._setup.context_tokens)
                drop_file_cache(order.path, written=True)
        seconds, cpu_s = time.perf_counter() - began_s, time.process_time() - cpu_began_s
        self._speaker.say(messages.Done(seconds=seconds, cpu_s=cpu_s))

    # -- the context ------------------------------------------------------------------------------------

    def _fill_context(self) -> None:
        base = self._setup.context_tokens
        if not base:
            return
        tokens = prompt_tokens(self._llm, base + 1 + self._setup.prompt_tokens)
        self._probe, self._prompt = tokens[base], tokens[base + 1 :]
        if self._setup.state:
            llms.load_state(self._llm, self._setup.state, tokens[:base])
            drop_file_cache(self._setup.state)
        else:
            self._read(tokens[:base], self._setup.batch_tokens)

    def _read(self, tokens: Sequence[int], chunk: int) -> None:
        """Decode `tokens` in chunks."""
        for start in range(0, len(tokens), chunk):
            self._speaker.say(messages.Progress(stage="prefill", done=start, total=len(tokens)))
            part = tokens[start : start + chunk]
            self._eval(list(part), said=True)
        self._speaker.say(messages.Progress(stage="prefill", done=len(tokens), total=len(tokens)))

    def _fill(self, count: int, chunk: int) -> None:
        begin = int(self._llm.n_tokens)
        self._read(prompt_tokens(self._llm, begin + count)[begin:], chunk)

    def _eval(self, tokens: list[int], *, said: bool, since_s: float | None = None) -> float:
        """Decode `tokens` at once; gives when it was done. Raises _Abandoned where nobody listens."""
        if self._abandoned.is_set():
            raise _Abandoned
        since_s = time.monotonic() if since_s is None else since_s
        self._llm.eval(tokens)
        now_s = time.monotonic()
        if said:
            self._speaker.say(messages.Token(time_s=now_s, seconds=now_s - since_s, tokens=len(tokens)))
        return now_s

    def _digest(self) -> str:
        """Of the logits after the context and the probe, which is taken out again by the next decode."""
        self._llm.eval([self._probe])
        self._llm.n_tokens = self._setup.context_tokens
        return hashlib.sha256(llms.logits_of(self._llm).tobytes()).hexdigest()[:16]

    # -- what goes on under pressure ----------------------------------------------------------------------

    def _decode(self, order: messages.Decode) -> None:
        """Greedy, and past any end of text: what is measured is the time, not the story."""
        assert order.tokens is not None, "checked by the caller"
        self._progress(order.stage, order.tokens)
        began_s = last_s = time.monotonic()
        for number in range(order.tokens):
            if number == order.trim_at and llms.is_governed(self._setup.variant):
                self._llm.governor.trim(0.5)
                last_s = time.monotonic()
            if order.stage == "pressed" and self._pruner is not None:
                self._say_pruned(self._pruner.prune(self._llm))
            last_s = self._eval([llms.greedy(self._llm)], said=True, since_s=last_s)
            if order.max_s is not None and last_s - began_s > order.max_s:
                return

    def _say_pruned(self, pruned: messages.Pruned | None) -> None:
        if pruned is not None:
            self._speaker.say(pruned)

    def _decode_on(self) -> None:
        """Token after token until an order comes, and back to the end of the context in time."""
        last_s = time.monotonic()
        while self._orders.empty():
            if self._llm.n_tokens >= self._setup.context_tokens + self._setup.decoded_tokens:
                self._llm.n_tokens = self._setup.context_tokens  # the next decode takes out what comes after
            last_s = self._eval([llms.greedy(self._llm)], said=True, since_s=last_s)

    def _prefill_on(self) -> None:
        """The same long prompt again and again after the context, until an order comes."""
        last_s = time.monotonic()
        while True:
            self._llm.n_tokens = self._setup.context_tokens
            for start in range(0, len(self._prompt), self._setup.batch_tokens):
                if not self._orders.empty():
                    return
                chunk = self._prompt[start : start + self._setup.batch_tokens]
                last_s = self._eval(chunk, said=True, since_s=last_s)

    def _generate(self, tokens: int, again: int) -> None:
        self._llm.n_tokens = min(int(self._llm.n_tokens), self._setup.context_tokens - again)
        prompt = self._llm.input_ids[: self._setup.context_tokens].tolist()
        request = self._llm.generate(prompt, temp=0.0)
        decoded = sum(1 for _ in islice(request, tokens))
        request.close()
        if decoded != tokens:
            raise PsiKvError(f"the model stopped after {decoded} of {tokens} tokens")

    # -- afterwards -------------------------------------------------------------------------------------

    def _settle(self, max_s: float) -> messages.Settled:
        began_s = time.perf_counter()
        if not llms.is_governed(self._setup.variant):
            return messages.Settled(missing_cells=self._cells().lost, seconds=0.0, on_request=False)
        while (cells := self._cells()).masked and time.perf_counter() - began_s < max_s:
            self._progress("restore", int(self._llm.n_tokens), done=cells.live)
            self._abandoned.wait(_LOOK_S)
            if self._abandoned.is_set():
                raise _Abandoned
        on_request = cells.masked + cells.lost > 0
        missing = llms.put_back(self._llm)
        seconds = time.perf_counter() - began_s
        return messages.Settled(missing_cells=missing, seconds=seconds, on_request=on_request)

    def _whole(self) -> messages.Checked:
        """Ask until everything is back: right after the pressure, the governor still holds."""
        began_s = time.monotonic()
        llms.cut(self._llm, self._setup.context_tokens)
        digest = ""
        missing = self._put_back()
        while time.monotonic() - began_s < _WHOLE_TIMEOUT_S:
            if not missing:
                digest = self._digest()
            missing = self._put_back()
            if not missing and digest:  # nothing went while the digest was made
                return messages.Checked(missing_cells=0, digest=digest, seconds=time.monotonic() - began_s)
            time.sleep(_LOOK_S)
        return messages.Checked(missing_cells=missing, digest="", seconds=time.monotonic() - began_s)

    def _put_back(self) -> int:
        return llms.put_back(self._llm) if llms.is_governed(self._setup.variant) else 0

    # -- what is said -----------------------------------------------------------------------------------

    def _cells(self) -> llms.Cells:
        removed = 0 if self._pruner is None else self._pruner.removed_cells
        return llms.cells_of(self._llm, self._setup.variant, removed)

    def _progress(self, stage: Stage, total: int, done: int = 0) -> None:
        self._speaker.say(messages.Progress(stage=stage, done=done, total=total))

    def _on_event(self, event: Event) -> None:
        self._speaker.say(messages.Governed(event=event, live_cells=self._cells().live))

    def _on_turn(self) -> None:
        self._turns += 1


def main() -> int:
    """Entry point of the process. A failure is said in one line; gives the exit status."""
    speaker = Speaker()
    try:
        Worker(msgspec.json.decode(sys.argv[1], type=Setup), speaker).run()
    except (_Abandoned, BrokenPipeError):
        return 1
    except PsiKvError as error:
        speaker.say(messages.Failed(why=str(error), exit_status=error.exit_status))
        return error.exit_status
    except ModuleNotFoundError as error:
        why = f"this needs {error.name}: pip install 'psi-kv-governor[llama]'"
        speaker.say(messages.Failed(why=why, exit_status=PsiKvError.exit_status))
        return PsiKvError.exit_status
    return 0


if __name__ == "__main__":
    sys.exit(main())
