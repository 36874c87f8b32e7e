"""What recall costs while tokens are decoded with most of the context parked.

Turns of a few tokens in one context: without recall, with its sampling and scoring alone, and with all of it.
Processor time of the process is what is compared, so that a neighbour on a busy machine does not count.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Annotated, NamedTuple

from msgspec import Meta

from psi_kv_governor.cache import Range, Recall
from psi_kv_governor.errors import PsiKvError
from psikv_bench.fidelity.subject import recall_of
from psikv_bench.figures import Asked, Figure, figure
from psikv_bench.long_context import LongContext
from psikv_bench.options import Options
from psikv_bench.raw_context import PART
from psikv_bench.record import Recorder, Report
from psikv_bench.scene import Scene

SCORING = Asked("<=", 0.02)
"""Processor time of sampling and scoring over that of decoding without."""


class RecallOptions(Options, frozen=True, kw_only=True):
    """How much is measured."""

    live: Annotated[int, Meta(ge=1024, description="Cells that attention looks at.")] = 8192
    parked: Annotated[int, Meta(ge=256, description="Cells that are parked.")] = 32_768
    tokens: Annotated[int, Meta(ge=8, description="Of one turn.")] = 32
    rounds: Annotated[int, Meta(ge=1, description="Of three turns.")] = 12


class _Turn(NamedTuple):
    """What a token of one turn took."""

    cpu_s: float
    seconds: float
    read_bytes: float


def run(recorder: Recorder[RecallOptions]) -> Report:
    """Measure. Raises PsiKvError where recall does not work with this model."""
    options = recorder.options
    threads = options.threads or 1
    total = -(-(options.live + options.parked) // PART) * PART
    n_ctx = -(-(total + 3 * (options.rounds + 1) * options.tokens) // 256) * 256
    with LongContext(recorder.model, n_ctx, threads) as filled:
        recorder.say(f"{total:,} tokens", new=True)
        filled.fill(total)
        filled.decode_singly(1)  # the engine knows of attention from the first graph on
        filled.engine.recall(recall_of(filled.config, "follow", paused=True))  # what goes is summarised
        filled.mask(Range(filled.config.sink_cells, filled.config.sink_cells + options.parked))
        if why := filled.engine.recalled().why_not:
            raise PsiKvError(f"recall does not work with this model: {why}")
        turns = _turns(filled, options, recorder)
        sequence = filled.sequence()
        cells = figure("live cells at the end", "cells", [float(sequence.live_cells)])
        summary = filled.engine.recalled().summary_bytes / filled.cache().cell_bytes
    figures = [*_figures(turns), cells, figure("summary over what is parked", "share", [summary])]
    return recorder.save(recorder.report(figures, [threads]))


def _turn(filled: LongContext, settings: Recall, count: int) -> _Turn:
    filled.engine.recall(settings)
    read_bytes = filled.engine.recalled().read_bytes
    began_s, began_cpu_s = time.perf_counter(), time.process_time()
    filled.decode_singly(count)
    cpu_s, seconds = time.process_time() - began_cpu_s, time.perf_counter() - began_s
    read_bytes = filled.engine.recalled().read_bytes - read_bytes
    return _Turn(cpu_s / count, seconds / count, read_bytes / count)


def _turns(
    filled: LongContext, options: RecallOptions, recorder: Recorder[RecallOptions]
) -> dict[str, list[_Turn]]:
    """In each round every mode once, each first in its turn. The first round does not count."""
    modes = {
        "off": Recall(),
        "scoring": recall_of(filled.config, "follow", paused=True),
        "follow": recall_of(filled.config, "follow"),
    }
    found: dict[str, list[_Turn]] = {name: [] for name in modes}
    for number in range(options.rounds + 1):
        recorder.say(f"round {number} of {options.rounds}")
        names = list(modes)
        for name in names[number % 3 :] + names[: number % 3]:
            turn = _turn(filled, modes[name], options.tokens)
            if number:
                found[name].append(turn)
    return found


def _figures(turns: dict[str, list[_Turn]]) -> Sequence[Figure]:
    off = [turn.cpu_s for turn in turns["off"]]
    more = {
        name: [turn.cpu_s / without - 1.0 for turn, without in zip(turns[name], off, strict=True)]
        for name in ("scoring", "follow")
    }
    return [
        figure("sampling and scoring, processor time over decoding", "share", more["scoring"], SCORING),
        figure("with exchange", "share", more["follow"]),
        figure("without recall, processor time of a token", "ms", [1e3 * one for one in off]),
        figure("without recall", "tokens/s", [1.0 / turn.seconds for turn in turns["off"]]),
        figure("follow", "tokens/s", [1.0 / turn.seconds for turn in turns["follow"]]),
        figure("read a token", "kB", [turn.read_bytes / 1e3 for turn in turns["follow"]]),
    ]


SCENE = Scene(
    about="What recall costs a decoded token, with most of the context parked.",
    options=RecallOptions(),
    quick=RecallOptions(live=2048, parked=2048, rounds=4),
    run=run,
    examples=("psi-kv bench recall --quick", "psi-kv bench recall --threads 1 --out-dir recall"),
)
