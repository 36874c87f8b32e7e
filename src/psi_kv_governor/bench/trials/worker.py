"""The model of the trials: keeps one context, decodes or fills on when told to, and can be made whole again.

Reads a word a line on standard input. `decode` and `prefill` go on until the next word comes; `stop` ends
them; `restore` has the governor put back what waits in the store while decoding goes on; `whole` cuts what
was decoded off, puts everything back and gives a digest of the logits; `save` writes the context to the
state file. Reports in JSON lines (`messages`). Ends with its standard input.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import os
import queue
import sys
import threading
import time
from typing import Any, get_args

import numpy as np

from psi_kv_governor.bench.messages import Variant
from psi_kv_governor.bench.trials.messages import Filling, Opened, Stopped, Token, Whole
from psi_kv_governor.bench.trials.voice import Voice, greedy, logits_of, open_model, play
from psi_kv_governor.bench.twins import prompt_tokens
from psi_kv_governor.errors import PsiKvError

SPARE_CELLS = 192
"""Decoded before it goes back to the end of the context: fewer than the window that is never given up (256
cells), so that the cut is always between live cells."""
_CELLS_STEP = 256  # llama.cpp pads a context to it
_CHUNK_TOKENS = 512  # the default batch of Llama
_WHOLE_TIMEOUT_S = 20.0
_ASK_S = 0.02


def context_cells(context_tokens: int, prompt_chunk: int) -> int:
    """Cells for the context and what is decoded after it, as llama.cpp pads them."""
    wanted = context_tokens + max(SPARE_CELLS, prompt_chunk) + 1
    return -(-wanted // _CELLS_STEP) * _CELLS_STEP


class Worker:
    """One process of the model. `variant` says which class does it; everything else is the same."""

    def __init__(self, options: argparse.Namespace, voice: Voice) -> None:
        self._options, self._voice = options, voice
        self._words: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._llm: Any = None
        self._probe = 0
        self._prompt: list[int] = []

    def run(self) -> None:
        """Open, fill, then do what is said until nobody speaks any more."""
        options = self._options
        self._llm = open_model(
            options.variant,
            options.model,
            options.budget,
            n_ctx=context_cells(options.context, options.prompt),
            use_mmap=not options.no_mmap,
            n_threads=options.threads,
            n_threads_batch=os.cpu_count() if options.fill else options.threads,
        )
        if options.variant == "psi":
            self._voice.tell_of(self._llm)
        try:
            self._fill()
            self._voice.say(self._opened())
            threading.Thread(target=self._listen, daemon=True).start()
            while word := self._words.get():
                self._do(word)
        finally:
            self._llm.close()

    def _do(self, word: str) -> None:
        if word == "decode":
            self._decode()
        elif word == "prefill":
            self._prefill()
        elif word == "stop":
            self._voice.say(Stopped())
        elif word == "whole":
            self._voice.say(self._whole())
        elif word == "save":
            self._save()
            self._voice.say(Stopped())
        else:
            raise PsiKvError(f"the model's process does not know {word!r}")

    def _listen(self) -> None:
        """Words come in here, so that one can come while a token is decoded. An empty one is the end."""
        for line in sys.stdin:
            if line.strip() == "restore":
                self._llm.governor.restore()
            else:
                self._words.put(line.strip())
        self._words.put("")

    # -- the context ------------------------------------------------------------------------------------

    def _fill(self) -> None:
        base = self._options.context
        tokens = prompt_tokens(self._llm, base + 1 + self._options.prompt)
        self._probe, self._prompt = tokens[base], tokens[base + 1 :]
        if self._options.fill:
            for start in range(0, base, _CHUNK_TOKENS):
                self._voice.say(Filling(done=start, total=base))
                self._llm.eval(tokens[start : min(start + _CHUNK_TOKENS, base)])
        else:
            self._load(tokens[:base])

    def _load(self, tokens: list[int]) -> None:
        """The context from the state file, which llama.cpp streams: no copy of it in this process."""
        if self._options.variant != "psi":
            self._load_file(len(tokens))
        else:
            engine = self._llm._engine
            with engine.emptied_upstream():
                self._load_file(len(tokens))
                engine.track.loaded(np.arange(len(tokens)), np.array(tokens, dtype=np.intc))
        self._llm.input_ids[: len(tokens)] = tokens
        self._llm.n_tokens = len(tokens)
        _forget_pages(self._options.state)

    def _load_file(self, count: int) -> None:
        import llama_cpp

        found, told = (llama_cpp.llama_token * count)(), ctypes.c_size_t()
        path = self._options.state.encode()
        read = llama_cpp.llama_state_seq_load_file(self._llm.ctx, path, 0, found, count, ctypes.byref(told))
        if not read or told.value != count:
            raise PsiKvError("the prepared context could not be loaded: start the benchmark again")

    def _save(self) -> None:
        import llama_cpp

        base = self._options.context
        self._llm._ctx.kv_cache_seq_rm(0, base, -1)
        tokens = (llama_cpp.llama_token * base)(*self._llm.input_ids[:base].tolist())
        path = self._options.state.encode()
        if not llama_cpp.llama_state_seq_save_file(self._llm.ctx, path, 0, tokens, base):
            raise PsiKvError("the prepared context could not be kept: is there room in /var/tmp?")
        _forget_pages(self._options.state)

    def _opened(self) -> Opened:
        cell_bytes = 0
        if self._options.variant == "psi":
            able = self._llm.governor.capabilities.spill
            if not able.able:
                raise PsiKvError(f"nothing to measure with this model: {able.why}")
            cell_bytes = self._llm.governor.status().cell_bytes
        return Opened(cell_bytes=cell_bytes, digest=self._digest())

    def _digest(self) -> str:
        """Of the logits after the context and the probe, which is taken out again by the next decode."""
        self._llm.eval([self._probe])
        self._llm.n_tokens = self._options.context
        return hashlib.sha256(logits_of(self._llm).tobytes()).hexdigest()[:16]

    # -- what goes on under pressure ----------------------------------------------------------------------

    def _decode(self) -> None:
        """Greedy, token after token, until a word comes."""
        last_s = time.monotonic()
        while self._words.empty():
            if self._llm.n_tokens >= self._options.context + SPARE_CELLS:
                self._llm.n_tokens = self._options.context  # the next decode takes out what comes after
            self._llm.eval([greedy(self._llm)])
            last_s = self._said(last_s, 1)

    def _prefill(self) -> None:
        """The same long prompt again and again after the context, until a word comes."""
        last_s = time.monotonic()
        while True:
            self._llm.n_tokens = self._options.context
            for start in range(0, len(self._prompt), _CHUNK_TOKENS):
                if not self._words.empty():
                    return
                chunk = self._prompt[start : start + _CHUNK_TOKENS]
                self._llm.eval(chunk)
                last_s = self._said(last_s, len(chunk))

    def _said(self, last_s: float, tokens: int) -> float:
        now_s = time.monotonic()
        self._voice.say(Token(time_s=now_s, seconds=now_s - last_s, tokens=tokens))
        return now_s

    def _whole(self) -> Whole:
        """Ask until everything is back: right after the pressure, the governor still holds."""
        began_s = time.monotonic()
        base = self._options.context
        self._llm.n_tokens = base
        self._llm._ctx.kv_cache_seq_rm(0, base, -1)
        digest = ""
        missing = self._missing()
        while time.monotonic() - began_s < _WHOLE_TIMEOUT_S:
            if not missing:
                digest = self._digest()
            missing = self._missing()
            if not missing and digest:  # nothing went while the digest was made
                return Whole(missing_cells=0, digest=digest, seconds=time.monotonic() - began_s)
            time.sleep(_ASK_S)
        return Whole(missing_cells=missing, digest="", seconds=time.monotonic() - began_s)

    def _missing(self) -> int:
        """Cells that are away and do not come back when they are asked for."""
        return int(self._llm.make_whole()) if self._options.variant == "psi" else 0


def _forget_pages(path: str) -> None:
    """What was read or written through the page cache is charged to the pen, and is not wanted there."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fdatasync(descriptor)  # dirty pages cannot be dropped
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The options of the process."""
    parser = argparse.ArgumentParser(
        prog="psi_kv_governor.bench.trials.worker", description="The model of the trials."
    )
    parser.add_argument("--variant", choices=get_args(Variant), required=True)
    parser.add_argument("--model", required=True, help="GGUF file")
    parser.add_argument("--context", type=int, required=True, help="tokens in the context")
    parser.add_argument("--prompt", type=int, default=0, help="tokens of the prompt that `prefill` decodes")
    parser.add_argument("--state", required=True, help="file that holds the context, or will")
    parser.add_argument("--fill", action="store_true", help="decode the context, there is no state file yet")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--no-mmap", action="store_true", help="read the weights into memory")
    parser.add_argument("--budget", type=float, help="budget_per_min of the governor [default: its own]")
    return parser.parse_args(arguments)


def main() -> int:
    """Entry point of the process."""
    voice = Voice()
    return play(voice, Worker(parse(), voice).run)


if __name__ == "__main__":
    sys.exit(main())
