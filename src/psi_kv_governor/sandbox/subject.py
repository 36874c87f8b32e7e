"""The model of the scene, in a process of its own. It plays its part by itself, and says how far it is.

    python -m psi_kv_governor.sandbox.subject psi '{"model": "model.gguf"}'

Its arguments are the variant and the options. It waits for a line on standard input before it decodes under
pressure, for another before all is to come back, and for a last one, until when its memory can be looked at;
it ends when nobody speaks to it or listens.
"""

from __future__ import annotations

import os
import sys
import time
from typing import Any

import msgspec

from psi_kv_governor.events import Event
from psi_kv_governor.sandbox.llm import exit_status, greedy, open_llm, put_back
from psi_kv_governor.sandbox.scene_options import CALM_TOKENS, Said, SceneOptions, Stage
from psi_kv_governor.sandbox.text import prompt_tokens

_CHUNK_TOKENS = 512
_RESTORE_MAX_S = 30.0
_LOOK_S = 0.02


class Subject:
    """One variant in one scene."""

    def __init__(self, variant: str, options: SceneOptions) -> None:
        self._governed, self._options = variant != "fixed", options
        self._stage: Stage = "load"
        self._llm: Any = None

    def play(self) -> None:
        """All of it. Raises BrokenPipeError where nobody listens any more."""
        options = self._options
        self._say("load")
        self._llm = open_llm(
            options.model,
            plain=not self._governed,
            auto=not options.gentle,
            n_ctx=options.context_tokens + CALM_TOKENS + options.tokens + 1,
            n_threads=options.threads,
        )
        try:
            if self._governed:
                self._llm.governor.subscribe(self._on_event)
            self._fill()
            self._decode("calm", CALM_TOKENS)
            _wait()
            self._decode("pressed", options.tokens)
            self._say("restore")
            _wait()
            self._settle()
            _wait()
        finally:
            self._llm.close()

    def _say(self, stage: Stage, done: int = 0, **more: Any) -> None:
        self._stage = stage
        _write(Said(time_s=time.monotonic(), stage=stage, done=done, **more))

    def _on_event(self, event: Event) -> None:
        live_cells = self._llm.governor.status().live_cells
        _write(Said(time_s=event.time_s, stage=self._stage, event=event, live_cells=live_cells))

    def _fill(self) -> None:
        tokens = prompt_tokens(self._llm, self._options.context_tokens)
        for start in range(0, len(tokens), _CHUNK_TOKENS):
            self._say("prefill", start, total=len(tokens))
            self._llm.eval(tokens[start : start + _CHUNK_TOKENS])
        self._say("prefill", len(tokens), total=len(tokens))

    def _decode(self, stage: Stage, count: int) -> None:
        """Greedily, past any end of text: what counts is the time, not the story."""
        options, began_s = self._options, time.monotonic()
        self._say(stage, total=count)
        for number in range(1, count + 1):
            if options.gentle and self._governed and stage == "pressed" and number == count // 2 + 1:
                self._llm.governor.trim(0.5)
                self._say(stage, number - 1, total=count)  # the next token begins now
            self._llm.eval([greedy(self._llm)])
            self._say(stage, number, total=count)
            if time.monotonic() - began_s > options.decode_max_s:
                return

    def _settle(self) -> None:
        """Wait for what is away, then ask for it."""
        missing, asked = 0, False
        if self._governed:
            until_s = time.monotonic() + (0.0 if self._options.gentle else _RESTORE_MAX_S)
            status = self._llm.governor.status()
            while status.masked_cells and time.monotonic() < until_s:
                time.sleep(_LOOK_S)
                status = self._llm.governor.status()
            missing = status.masked_cells + status.lost_cells
            if asked := missing > 0:
                missing = put_back(self._llm)
        self._say("end", missing_cells=missing, on_request=asked)


def _write(said: Said) -> None:
    """A line, from any thread: a pipe takes it whole."""
    os.write(sys.stdout.fileno(), msgspec.json.encode(said) + b"\n")


def _wait() -> None:
    if not sys.stdin.readline():
        raise BrokenPipeError


if __name__ == "__main__":
    subject = Subject(sys.argv[1], msgspec.json.decode(sys.argv[2], type=SceneOptions))
    sys.exit(exit_status(subject.play))
