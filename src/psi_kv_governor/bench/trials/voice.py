"""What the model's processes of all trials share: the way they speak, open a model, and end."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import numpy.typing as npt

from psi_kv_governor.bench.messages import Variant
from psi_kv_governor.bench.trials.messages import Failed, Governed, Message, Turned
from psi_kv_governor.control import Action, Mode
from psi_kv_governor.errors import PsiKvError

if TYPE_CHECKING:
    from psi_kv_governor.control import Turn
    from psi_kv_governor.events import Event


class Abandoned(Exception):
    """Nobody listens any more."""


class Voice:
    """Writes messages to standard output, from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # events come from the governor's thread
        self._encoder = msgspec.json.Encoder()

    def say(self, message: Message) -> None:
        with self._lock:
            os.write(sys.stdout.fileno(), self._encoder.encode(message) + b"\n")

    def tell_of(self, llm: Any) -> None:
        """Tell of everything that the governor of `llm` does, and of every turn that is not a calm one."""

        def on_event(event: Event) -> None:
            status = llm.governor.status()
            self.say(Governed(event=event, live_cells=status.live_cells))

        llm.governor.subscribe(on_event)
        llm.governor.observe(self._on_turn)

    def _on_turn(self, turn: Turn) -> None:
        reading, decision = turn.reading, turn.decision
        if decision.mode is Mode.CALM and decision.action is Action.NONE and not reading.some:
            return
        self.say(
            Turned(
                time_s=reading.time_s,
                some=reading.some,
                full=reading.full,
                headroom_bytes=reading.headroom_bytes,
                live_cells=turn.cache.live_cells,
                action=decision.action.value,
                cells=decision.cells,
                mode=decision.mode.value,
                reason=decision.reason,
            )
        )


def open_model(variant: Variant, path: str, budget_per_min: float | None, **arguments: Any) -> Any:
    """A `llama_cpp.Llama` for `fixed`, a GovernedLlama for `psi`: else all is the same."""
    arguments = {"flash_attn": True, "verbose": False, **arguments}
    if variant == "psi":
        from psi_kv_governor import GovernedLlama
        from psi_kv_governor.config import load_config

        return GovernedLlama(path, config=load_config(budget_per_min=budget_per_min), **arguments)
    from llama_cpp import Llama

    return Llama(path, **arguments)


def logits_of(llm: Any) -> npt.NDArray[np.float32]:
    """Of the last token that was decoded, shape (vocabulary,): not a copy."""
    import llama_cpp

    found = llama_cpp.llama_get_logits_ith(llm.ctx, -1)
    logits: npt.NDArray[np.float32] = np.ctypeslib.as_array(found, shape=(llm.n_vocab(),))
    return logits


def greedy(llm: Any) -> int:
    """The likeliest next token.

    Not by `Llama.sample`: what that makes for each token goes only with Python's collector of cycles, some
    20 MiB at a time, which is as much as the pens here have free.
    """
    return int(np.argmax(logits_of(llm)))


def play(voice: Voice, part: Callable[[], None]) -> int:
    """Run `part` to its end; gives the exit status of the process. A failure is told in one line."""
    try:
        part()
    except (Abandoned, BrokenPipeError):
        return 1
    except PsiKvError as error:
        voice.say(Failed(why=str(error), exit_status=error.exit_status))
        return error.exit_status
    except ModuleNotFoundError as error:
        why = f"this needs {error.name}: pip install 'psi-kv-governor[llama]'"
        voice.say(Failed(why=why, exit_status=PsiKvError.exit_status))
        return PsiKvError.exit_status
    return 0
