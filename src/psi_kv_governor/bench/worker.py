"""The model of a scene: fills a context, decodes when told to, and reports in JSON lines (`messages`).

Reads a word a line on standard input: `go` (decode now), `calm` (the pressure is over). Ends with it.
"""

from __future__ import annotations

import argparse
import os
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import msgspec

from psi_kv_governor.bench.messages import (
    Decoded,
    Failed,
    Governed,
    Message,
    Progress,
    Pruned,
    Ready,
    Settled,
    Stage,
    Token,
    Variant,
)
from psi_kv_governor.bench.reference import Cut, MiddlePruner
from psi_kv_governor.bench.sampling import sample
from psi_kv_governor.errors import PsiKvError

if TYPE_CHECKING:
    from psi_kv_governor.events import Event

CALM_TOKENS = 16
"""Decoded in peace first: they warm up what is made on first use, and say what the machine can do."""
PREFILL_BATCH = 512
"""The default of Llama, which all variants keep."""
_CELLS_STEP = 256  # llama.cpp pads a context to it
_LOOK_S = 0.1


class _Abandoned(Exception):
    """The scene is gone."""


def context_cells(context_tokens: int, tokens: int) -> int:
    """Cells that a context needs for the prompt and all that is decoded after it."""
    wanted = context_tokens + CALM_TOKENS + tokens + 1
    return -(-wanted // _CELLS_STEP) * _CELLS_STEP


def plain_arguments(context_cells: int, threads: int) -> dict[str, Any]:
    """The arguments of llama_cpp.Llama that all variants share, so that only what governs them differs."""
    return {
        "n_ctx": context_cells,
        "flash_attn": True,
        "n_threads": threads,
        # Filling the context is not what is measured: it may have the whole machine.
        "n_threads_batch": os.cpu_count(),
        "verbose": False,
    }


def prompt_text(n_characters: int) -> str:
    """English that every Python has: its own reference manual, in a fixed order."""
    from pydoc_data.topics import topics  # type: ignore[import-untyped, unused-ignore]

    parts: list[str] = []
    size = 0
    while size < n_characters:
        for name in sorted(topics):
            parts.append(topics[name])
            size += len(parts[-1])
            if size >= n_characters:
                break
    return "".join(parts)[:n_characters]


class Worker:
    """One run of the model. `variant` says which class does it; everything else is the same."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        self._parent = os.getppid()
        self._voice = threading.Lock()  # events come from the governor's thread
        self._encoder = msgspec.json.Encoder()
        self._llm: Any = None
        self._pruner: MiddlePruner | None = None
        self._pruned_cells = 0

    def run(self) -> None:
        """Load, fill, decode, settle."""
        self._load()
        try:
            self._prefill()
            began_s = time.perf_counter()
            self._decode(CALM_TOKENS, "calm", float("inf"))
            seconds = time.perf_counter() - began_s
            self._say(Ready(calm_tokens_per_s=CALM_TOKENS / seconds, live_cells=self._live_cells()))
            self._wait_for("go")
            began_s = time.perf_counter()
            self._decode(self._options.tokens, "pressed", self._options.max_s)
            self._say(Decoded(seconds=time.perf_counter() - began_s))
            self._wait_for("calm")
            self._say(self._settle())
            sys.stdin.read()
        finally:
            self._llm.close()

    def fail(self, why: str, exit_status: int) -> None:
        """Tell why this is the end."""
        self._say(Failed(why=why, exit_status=exit_status))

    def _load(self) -> None:
        self._say(Progress(stage="load", done=0, total=1))
        options = self._options
        cells = options.ctx_size or context_cells(options.context, options.tokens)
        arguments = plain_arguments(cells, options.threads)
        self._llm = self._governed(arguments) if options.variant == "psi" else self._plain(arguments)
        # One for all tokens, as `generate` does. `sample` would make a new one for each, which keeps 1 MB
        # until the garbage collector comes by: 35 MB came and went, and looked like pressure.
        self._llm._sampler = self._llm._init_sampler(temp=0.0)
        if options.variant == "psi":
            self._llm.governor.subscribe(self._tell)

    def _governed(self, arguments: dict[str, Any]) -> Any:
        from psi_kv_governor import GovernedLlama, load_config

        options = self._options
        given = {"sink_cells": options.keep, "window_cells": options.tail}
        config = load_config(**{name: value for name, value in given.items() if value is not None})
        return GovernedLlama(options.model, config=config, auto=not options.by_hand, **arguments)

    def _plain(self, arguments: dict[str, Any]) -> Any:
        from llama_cpp import Llama

        options = self._options
        if options.variant == "reference":
            file = Path(options.pressure_file)
            self._pruner = MiddlePruner(file, options.keep, options.tail, options.min_prune)
        return Llama(options.model, **arguments)

    def _prefill(self) -> None:
        total = self._options.context
        tokens = self._llm.tokenize(prompt_text(total * 8).encode())[:total]
        if len(tokens) < total:
            raise PsiKvError(f"the prompt has {len(tokens)} tokens, not {total}: give a smaller --ctx")
        for start in range(0, total, PREFILL_BATCH):
            self._say(Progress(stage="prefill", done=start, total=total))
            self._llm.eval(tokens[start : start + PREFILL_BATCH])
            self._look_at_parent()
        self._say(Progress(stage="prefill", done=total, total=total))

    def _decode(self, tokens: int, stage: Stage, max_s: float) -> None:
        """Greedy, and past any end of text: what is measured is the time, not the story."""
        self._say(Progress(stage=stage, done=0, total=tokens))
        trim_at = tokens // 2 if self._options.by_hand and stage == "pressed" else -1
        began_s = last_s = time.perf_counter()
        for number in range(tokens):
            if number == trim_at and self._options.variant == "psi":
                self._llm.governor.trim(0.5)
                last_s = time.perf_counter()
            if self._pruner is not None and stage == "pressed":
                self._prune(self._pruner.look(time.monotonic(), self._llm.n_tokens))
            self._llm.eval([self._llm.sample()])
            now_s = time.perf_counter()
            if stage == "pressed":
                self._say(Token(seconds=now_s - last_s))
            last_s = now_s
            self._look_at_parent()
            if now_s - began_s > max_s:
                return

    def _prune(self, cut: Cut | None) -> None:
        """The reference method's whole answer to pressure: `n_tokens` stays, and with it the positions."""
        if cut is None:
            return
        before_bytes = _own_bytes()
        self._llm._ctx.kv_cache_seq_rm(0, cut.start, cut.stop)
        self._pruned_cells += cut.stop - cut.start
        self._say(
            Pruned(
                cells=cut.stop - cut.start,
                live_cells=self._live_cells(),
                bytes_returned=before_bytes - _own_bytes(),
            )
        )

    def _settle(self) -> Settled:
        """Wait until the governor has put back what waits in the store; then ask for what is still away."""
        began_s = time.perf_counter()
        if self._options.variant != "psi":
            return Settled(missing_cells=self._missing(), seconds=0.0, by_hand=False)
        deadline_s = began_s + (0.0 if self._options.by_hand else self._options.restore_s)
        while self._llm.governor.status().spilled_cells and time.perf_counter() < deadline_s:
            self._say(Progress(stage="restore", done=self._live_cells(), total=self._llm.n_tokens))
            time.sleep(_LOOK_S)
            self._look_at_parent()
        by_hand = self._missing() > 0
        away = int(self._llm.make_whole())
        return Settled(missing_cells=away, seconds=time.perf_counter() - began_s, by_hand=by_hand)

    def _missing(self) -> int:
        if self._options.variant != "psi":
            return self._pruned_cells
        return int(self._llm.governor.status().holes)

    def _live_cells(self) -> int:
        return int(self._llm.n_tokens) - self._missing()

    def _tell(self, event: Event) -> None:
        self._say(Governed(event=event, live_cells=self._live_cells()))

    def _say(self, message: Message) -> None:
        with self._voice:
            os.write(sys.stdout.fileno(), self._encoder.encode(message) + b"\n")

    def _wait_for(self, word: str) -> None:
        if sys.stdin.readline().strip() != word:
            raise _Abandoned

    def _look_at_parent(self) -> None:
        if os.getppid() != self._parent:
            raise _Abandoned


def _own_bytes() -> int:
    """Anonymous memory of this process, in RAM or in swap."""
    look = sample(os.getpid())
    assert look is not None, "this process is here"
    return look.anonymous_bytes + look.swap_bytes


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The options of the process."""
    parser = argparse.ArgumentParser(prog="psi_kv_governor.bench.worker", description="The model of a scene.")
    parser.add_argument("--variant", choices=get_args(Variant), required=True)
    parser.add_argument("--model", required=True, help="GGUF file")
    parser.add_argument("--context", type=int, required=True, help="tokens to fill the context with")
    parser.add_argument("--tokens", type=int, required=True, help="tokens to decode under pressure")
    parser.add_argument("--ctx-size", type=int, help="cells of the cache [default: as few as will do]")
    parser.add_argument("--keep", type=int, help="first tokens that never go [psi default: sink_cells]")
    parser.add_argument("--tail", type=int, help="last tokens that never go [psi default: window_cells]")
    parser.add_argument("--min-prune", type=int, help="reference: never remove fewer tokens")
    parser.add_argument("--pressure-file", help="reference: the PSI file that it polls")
    parser.add_argument("--threads", type=int, default=1, help="threads that decode")
    parser.add_argument("--max-s", type=float, default=120.0, help="decode no longer than this")
    parser.add_argument("--restore-s", type=float, default=30.0, help="wait this long for the restore")
    parser.add_argument("--by-hand", action="store_true", help="trim and restore by hand: nobody presses")
    options = parser.parse_args(arguments)
    needed = (options.keep, options.tail, options.min_prune, options.pressure_file)
    if options.variant == "reference" and None in needed:
        parser.error("the reference needs --keep, --tail, --min-prune and --pressure-file")
    return options


def main() -> int:
    """Entry point of the process."""
    worker = Worker(parse())
    try:
        worker.run()
    except (_Abandoned, BrokenPipeError):
        return 1
    except PsiKvError as error:
        worker.fail(str(error), error.exit_status)
        return error.exit_status
    except ModuleNotFoundError as error:
        worker.fail(f"this needs {error.name}: pip install 'psi-kv-governor[llama]'", PsiKvError.exit_status)
        return PsiKvError.exit_status
    return 0


if __name__ == "__main__":
    sys.exit(main())
