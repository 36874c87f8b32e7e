"""The process that holds a model: opens it, and does what it is ordered to (`messages`).

    python -m psi_kv_governor.sandbox.worker '{"variant": "psi", "model": "model.gguf"}'

Its one argument is a Setup. Orders come in on standard input, messages go out on standard output. It ends
with its standard input, or when nobody reads what it says.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Union

import msgspec

from psi_kv_governor.errors import PsiKvError
from psi_kv_governor.events import Event
from psi_kv_governor.sandbox import llm as llms
from psi_kv_governor.sandbox import messages
from psi_kv_governor.sandbox.messages import Setup
from psi_kv_governor.sandbox.text import prompt_tokens

_LOOK_S = 0.02
_CHUNK_TOKENS = 512

Actions = Mapping[type[messages.Order], Callable[[Any], messages.Message | None]]


def say(message: messages.Message) -> None:
    """Write one, from any thread: a pipe takes a line whole. Raises BrokenPipeError where nobody reads."""
    os.write(sys.stdout.fileno(), msgspec.json.encode(message) + b"\n")


class Worker:
    """One process of the model."""

    def __init__(self, setup: Setup) -> None:
        self.setup: Any = setup
        self.llm: Any = None
        self.orders = open(0, "rb", buffering=0, closefd=False)  # noqa: SIM115  # unbuffered: it can be polled

    def actions(self) -> Actions:
        """What is done on each order. Gives what is said of it; None: Done."""
        return {messages.Decode: self.decode, messages.Settle: self.settle}

    def run(self) -> None:
        """Open, then carry out orders until nobody gives any more."""
        say(messages.Progress(stage="load", done=0, total=1))
        self.open()
        try:
            self.fill_context()
            say(self.opened())
            actions = self.actions()
            decoder = msgspec.json.Decoder(Union[tuple(actions)])  # noqa: UP007
            while line := self.orders.readline():
                order = decoder.decode(line)
                began_s, cpu_began_s = time.perf_counter(), time.process_time()
                answer = actions[type(order)](order)
                seconds, cpu_s = time.perf_counter() - began_s, time.process_time() - cpu_began_s
                say(answer or messages.Done(seconds=seconds, cpu_s=cpu_s))
        finally:
            self.llm.close()

    def open(self) -> None:
        """The model."""
        self.llm = llms.open_llm(self.setup)
        if self.setup.governed:
            self.llm.governor.subscribe(self._on_event)

    def opened(self) -> messages.Opened:
        """What is said once the context is full."""
        return messages.Opened()

    # -- tokens -----------------------------------------------------------------------------------------

    def fill_context(self) -> None:
        """Decode as much of the text as the context is to hold."""
        if self.setup.context_tokens:
            self.read(prompt_tokens(self.llm, self.setup.context_tokens))

    def read(self, tokens: Sequence[int], chunk: int = _CHUNK_TOKENS) -> None:
        """Decode `tokens` in chunks."""
        for start in range(0, len(tokens), chunk):
            say(messages.Progress(stage="prefill", done=start, total=len(tokens)))
            self.eval(tokens[start : start + chunk], time.monotonic())
        say(messages.Progress(stage="prefill", done=len(tokens), total=len(tokens)))

    def eval(self, tokens: Sequence[int], since_s: float) -> float:
        """Decode `tokens` at once; gives when it was done."""
        self.llm.eval(list(tokens))
        now_s = time.monotonic()
        say(messages.Token(time_s=now_s, seconds=now_s - since_s, tokens=len(tokens)))
        return now_s

    def decode(self, order: messages.Decode) -> None:
        """Token after token."""
        say(messages.Progress(stage=order.stage, done=0, total=order.tokens))
        began_s = last_s = time.monotonic()
        for number in range(order.tokens):
            if number == order.trim_at and self.setup.governed:
                self.llm.governor.trim(0.5)
                last_s = time.monotonic()
            last_s = self.eval([self.next_token(order)], last_s)
            if order.max_s is not None and last_s - began_s > order.max_s:
                return

    def next_token(self, order: messages.Decode) -> int:
        """The one that is decoded next."""
        del order
        return llms.greedy(self.llm)

    # -- cells ------------------------------------------------------------------------------------------

    def cells(self) -> llms.Cells:
        """Where those of the context are."""
        return llms.cells_of(self.llm, plain=self.setup.plain)

    def settle(self, order: messages.Settle) -> messages.Settled:
        """Wait for what is away, then ask for it."""
        until_s = time.monotonic() + order.max_s
        while (cells := self.cells()).masked and time.monotonic() < until_s:
            say(messages.Progress(stage="restore", done=cells.live, total=int(self.llm.n_tokens)))
            time.sleep(_LOOK_S)
        missing = cells.masked + cells.lost
        asked = self.setup.governed and missing > 0
        return messages.Settled(missing_cells=self.put_back() if asked else missing, on_request=asked)

    def put_back(self) -> int:
        """Ask for all that is away; gives the cells that stay away."""
        return llms.put_back(self.llm) if self.setup.governed else 0

    def _on_event(self, event: Event) -> None:
        say(messages.Governed(event=event, live_cells=self.cells().live))


def main(kind: type[Worker] = Worker, setup: type[Setup] = Setup) -> int:
    """Entry point of the process. A failure is said in one line; gives the exit status."""
    try:
        kind(msgspec.json.decode(sys.argv[1], type=setup)).run()
    except BrokenPipeError:
        return 1
    except PsiKvError as error:
        print(error, file=sys.stderr)
        return error.exit_status
    except ModuleNotFoundError as error:
        print(f"this needs {error.name}: pip install 'psi-kv-governor[llama]'", file=sys.stderr)
        return PsiKvError.exit_status
    return 0


if __name__ == "__main__":
    sys.exit(main())
