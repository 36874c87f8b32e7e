"""What a trim returns and how fast, that it changes no bit, and what coming back costs.

Each case takes ranges out of a full context in three ways, one after the other:

1. by metadata alone, as upstream does, and then by a release of what is free: the share and the speed of
   the release, and next-token logits before and after it;
2. masked and put back: the share of the whole step, and next-token logits in comparison with those of plain
   llama.cpp, which never gave anything up;
3. dropped and decoded again: how much longer that takes than putting the same range back.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Iterator, Sequence
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from psi_kv_governor.cache import Range, Verb, cells_in
from psi_kv_governor.errors import PsiKvError
from psi_kv_governor.sandbox.text import prompt_tokens
from psikv_bench.figures import Asked, Figure, figure
from psikv_bench.host import Host
from psikv_bench.machine import cores
from psikv_bench.messages import Setup
from psikv_bench.model import Context, Logits, differing
from psikv_bench.options import Options
from psikv_bench.process_memory import own_memory
from psikv_bench.record import Recorder, Report
from psikv_bench.scene import Scene
from psikv_bench.trials.sizing import until_opened

LEAST_TRIMMED = Asked(">=", 0.60, "min")
RETURNED = Asked(">=", 0.95, "min")
RELEASE_SPEED = Asked(">=", 5.0)
IDENTICAL = Asked("<=", 0, "max")
RESTORE_GAIN = Asked(">=", 50.0)

SINK_CELLS = 64
"""Left at the start of the context, and WINDOW_CELLS at its end, as the governor's defaults do."""
WINDOW_CELLS = 256
SHARE = 0.7
"""Of the context that is given up. A range keeps a part of the page at each end, in the mean one page in all:
3 % of 700 rows of the smallest kind (q8_0, 204 bytes)."""
_SPARE_CELLS = 256  # llama.cpp pads a context to it; the probe needs one

CacheType = Literal["f16", "q8_0"]


class Case(msgspec.Struct, frozen=True):
    """One context and the ranges that are taken out of it."""

    cache: CacheType
    tokens: int
    ranges: int

    def __str__(self) -> str:
        return f"{self.cache}, {self.tokens:,} tokens, {self.ranges} range{'s' if self.ranges > 1 else ''}"


class TrimOptions(Options, frozen=True, kw_only=True):
    """How much is measured."""

    repeats: Annotated[int, Meta(ge=1, description="How often each case is measured.")] = 7
    again: Annotated[int, Meta(ge=1, description="How often cells are decoded again.")] = 3
    again_cells: Annotated[int, Meta(ge=1, description="So many of them; all [all].")] | None = None


_FULL = (Case("f16", 4096, 1), Case("f16", 4096, 4), Case("q8_0", 4096, 1), Case("q8_0", 4096, 4))
# 2,048 tokens are too few for more ranges: see SHARE.
_QUICK = (Case("f16", 4096, 1), Case("f16", 4096, 4), Case("q8_0", 2048, 1), Case("q8_0", 2048, 2))


def ranges_in(tokens: int, share: float, count: int) -> list[Range]:
    """`count` ranges of equal size that take `share` of `tokens` in all, evenly between sinks and window.

    The first one begins right after the sinks. Raises PsiKvError when they don't fit.
    """
    between = tokens - SINK_CELLS - WINDOW_CELLS
    size = math.ceil(tokens * share / count)
    gap = (between - size * count) // count
    if size < 1 or gap < (count > 1):
        raise PsiKvError(f"{tokens} tokens are too few for {count} ranges of {share:.0%} in all")
    starts = [SINK_CELLS + number * (size + gap) for number in range(count)]
    return [Range(start, start + size) for start in starts]


def run(recorder: Recorder[TrimOptions]) -> Report:
    """Measure every case, those with the same context together."""
    figures = list(measure(recorder, _QUICK if recorder.quick else _FULL))
    return recorder.save(recorder.report(figures, [recorder.options.threads or cores()]))


def measure(recorder: Recorder[TrimOptions], cases: Sequence[Case]) -> Iterator[Figure]:
    """The figures of `cases`."""
    options = recorder.options
    for cache, tokens in dict.fromkeys((case.cache, case.tokens) for case in cases):
        setup = Setup(
            # One token at a time is decoded by one thread: a busy neighbour delays that least (ggml's
            # threads spin for each other), and what is compared is bits.
            variant="fixed", model=options.model, context_tokens=tokens, decoded_tokens=_SPARE_CELLS,
            cache=cache, prefill_threads=options.threads or cores(),
        )  # fmt: skip
        with Host(setup) as host:  # plain llama.cpp, in a process of its own
            plain = until_opened(host, recorder.say).digest
        governed = msgspec.structs.replace(setup, variant="psi", auto=False)
        with _Filled(governed, recorder) as filled:
            for case in [case for case in cases if (case.cache, case.tokens) == (cache, tokens)]:
                yield from _case_figures(filled, case, plain, recorder)
            yield from _comeback_figures(filled, cache, recorder)


class _Filled(Context):
    """A governed context full of text, which is decoded anew where a range was taken out of it for good."""

    def __init__(self, setup: Setup, recorder: Recorder[TrimOptions]) -> None:
        super().__init__(setup, setup.context_tokens + _SPARE_CELLS)
        *self.prompt, self._probe = prompt_tokens(self.llm, setup.context_tokens + 1)
        recorder.say(f"decoding {len(self.prompt):,} tokens", new=True)
        self.read(self.prompt)
        self._state = self.llm.save_state()

    def refill(self) -> None:
        """Every token is back as it was decoded, and nothing else."""
        self.llm.load_state(self._state)

    def next_logits(self) -> Logits:
        """Logits after the probe token, shape (1, vocabulary); the probe is taken out again."""
        found = self.logits([self._probe])
        self.cut(len(self.prompt))
        return found

    def remove(self, ranges: Sequence[Range]) -> None:
        """Take the cells of `ranges` out of the metadata, as upstream does: the rows stay as they are."""
        for start, stop in ranges:
            self.llm._ctx.kv_cache_seq_rm(0, start, stop)

    def release(self) -> int:
        """Return the pages of cells nobody uses; gives the bytes."""
        return self.apply(Verb.RELEASE, sequence=None).bytes_returned


_FIGURES: tuple[tuple[str, str, Asked | None], ...] = (
    ("returned by a release", "share", RETURNED),
    ("returned by a trim", "share", RETURNED),
    ("release", "GB/s", RELEASE_SPEED),
    ("trim", "GB/s", None),
    ("restore", "GB/s", None),
    ("logits changed by the release", "logits", IDENTICAL),
    ("logits unlike never trimmed, after restore", "logits", IDENTICAL),
    ("rounds unlike plain llama.cpp, after restore", "times", IDENTICAL),
)
"""Of each case, in the order in which a round gives them."""


def _case_figures(
    filled: _Filled, case: Case, plain: str, recorder: Recorder[TrimOptions]
) -> Iterator[Figure]:
    ranges = ranges_in(case.tokens, SHARE, case.ranges)
    _round(filled, ranges, plain)  # not counted: what is made on first use (1.7 MB) grows meanwhile
    rounds = []
    for number in range(recorder.options.repeats):
        recorder.say(f"{case}: {number + 1} of {recorder.options.repeats}")
        rounds.append(_round(filled, ranges, plain))
    yield figure("trimmed", "share", [cells_in(ranges) / case.tokens], LEAST_TRIMMED, case=str(case))
    for (name, unit, asked), values in zip(_FIGURES, zip(*rounds, strict=True), strict=True):
        yield figure(name, unit, values, asked, case=str(case))


def _round(filled: _Filled, ranges: Sequence[Range], plain: str) -> tuple[float, ...]:
    """One pass of the first two ways: the values of _FIGURES."""
    n_bytes = cells_in(ranges) * filled.cell_bytes
    filled.refill()
    never = filled.next_logits()
    filled.remove(ranges)
    by_metadata = filled.next_logits()
    before = own_memory()
    began_s = time.perf_counter()
    returned = filled.release()
    release_s = time.perf_counter() - began_s
    released = before.resident_bytes - own_memory().resident_bytes
    after_release = filled.next_logits()

    filled.refill()
    before = own_memory()
    mask_s = filled.mask(ranges)
    masked = before.resident_bytes - own_memory().resident_bytes
    unmask_s = filled.unmask()
    restored = filled.next_logits()
    return (
        released / n_bytes,
        masked / n_bytes,
        returned / release_s / 1e9,
        n_bytes / mask_s / 1e9,
        n_bytes / unmask_s / 1e9,
        differing(by_metadata, after_release),
        differing(never, restored),
        int(hashlib.sha256(restored.tobytes()).hexdigest()[: len(plain)] != plain),
    )


def _comeback_figures(filled: _Filled, cache: CacheType, recorder: Recorder[TrimOptions]) -> Iterator[Figure]:
    options, tokens = recorder.options, filled.prompt
    first = ranges_in(len(tokens), SHARE, 1)[0]
    part = Range(first.start, min(first.stop, first.start + (options.again_cells or first.cells)))
    restore_s, again_s = [], []
    for number in range(options.again):
        recorder.say(f"{cache}: decoding {part.cells:,} cells again, {number + 1} of {options.again}")
        filled.refill()
        filled.mask([part])
        restore_s.append(filled.unmask())
        filled.cut(part.start)
        began_s = time.perf_counter()
        filled.read(tokens[part.start : part.stop])
        again_s.append(time.perf_counter() - began_s)
    case = f"{cache}, {part.cells:,} of {len(tokens):,} tokens"
    gains = [slow / fast for slow, fast in zip(again_s, restore_s, strict=True)]
    yield figure("decoded again", "s", again_s, case=case)
    yield figure("restored", "s", restore_s, case=case)
    yield figure("decoding again over restoring", "x", gains, RESTORE_GAIN, case=case)


SCENE = Scene(
    about="What a trim returns and how fast, that it changes no bit, and what coming back costs.",
    options=TrimOptions(),
    quick=TrimOptions(repeats=3, again=2, again_cells=512),
    run=run,
    examples=("psi-kv bench trim --quick",),
)
