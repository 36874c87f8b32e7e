"""The model of a capacity probe: decodes a prompt in chunks, then tokens, and says how each of them went.

Reports in JSON lines (`messages`): a Token for every chunk and every token, and Grown at the end.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from typing import Any, get_args

from psi_kv_governor.bench.messages import Variant
from psi_kv_governor.bench.trials.messages import Filling, Grown, Token
from psi_kv_governor.bench.trials.voice import Abandoned, Voice, greedy, open_model, play
from psi_kv_governor.bench.twins import prompt_tokens


class Grower:
    """One probe. The context has exactly the cells that it needs: plain llama.cpp pays for all of them."""

    def __init__(self, options: argparse.Namespace, voice: Voice) -> None:
        self._options, self._voice = options, voice
        self._parent = os.getppid()

    def run(self) -> None:
        """Open, fill, decode, and tell what of it is in the cache."""
        options = self._options
        llm = open_model(
            options.variant,
            options.model,
            None,
            n_ctx=options.length,
            n_batch=options.chunk,
            n_threads=options.threads,
            n_threads_batch=options.threads,
        )
        try:
            if options.variant == "psi":
                self._voice.tell_of(llm)
            self._grow(llm)
            self._voice.say(self._grown(llm))
        finally:
            llm.close()

    def _grow(self, llm: Any) -> None:
        prompt = prompt_tokens(llm, self._options.length - self._options.tokens)
        for start in range(0, len(prompt), self._options.chunk):
            self._voice.say(Filling(done=start, total=len(prompt)))
            chunk = prompt[start : start + self._options.chunk]
            self._timed(llm, chunk)
        self._voice.say(Filling(done=len(prompt), total=len(prompt)))
        for _ in range(self._options.tokens):
            self._timed(llm, [])

    def _timed(self, llm: Any, chunk: list[int]) -> None:
        """Decode a chunk, or the next token where there is none."""
        if os.getppid() != self._parent:
            raise Abandoned
        began_s = time.monotonic()
        llm.eval(chunk or [greedy(llm)])
        now_s = time.monotonic()
        self._voice.say(Token(time_s=now_s, seconds=now_s - began_s, tokens=max(1, len(chunk))))

    def _grown(self, llm: Any) -> Grown:
        if self._options.variant != "psi":
            return Grown(live_cells=llm.n_tokens, spilled_cells=0, lost_cells=0)
        status = llm.governor.status()
        return Grown(
            live_cells=status.live_cells, spilled_cells=status.spilled_cells, lost_cells=status.lost_cells
        )


def main() -> int:
    """Entry point of the process."""
    parser = argparse.ArgumentParser(
        prog="psi_kv_governor.bench.trials.grow", description="A context that grows to a length."
    )
    parser.add_argument("--variant", choices=get_args(Variant), required=True)
    parser.add_argument("--model", required=True, help="GGUF file")
    parser.add_argument("--length", type=int, required=True, help="cells of the context, all of them used")
    parser.add_argument("--tokens", type=int, default=32, help="of the length: decoded one by one at its end")
    parser.add_argument("--chunk", type=int, default=128, help="tokens of the prompt decoded at once")
    parser.add_argument("--threads", type=int, default=1)
    voice = Voice()
    return play(voice, Grower(parser.parse_args(), voice).run)


if __name__ == "__main__":
    sys.exit(main())
