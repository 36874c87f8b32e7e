"""What a trim returns and how fast, that it changes no bit, and what coming back costs.

Each case takes holes out of a full context in three ways, one after the other:

1. by metadata alone, as upstream does, and then by a release of what is free: the share and the speed of
   the release, and next-token logits before and after it and in a plain context with the same holes;
2. spilled to the disk store, released and restored: the share of the whole step, and next-token logits in
   comparison with a plain context that never gave anything up;
3. evicted and recomputed: how much longer that takes than restoring the same range.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import msgspec

from psi_kv_governor.bench.record import Asked, Figure, Options, Recorder, Report, Say, cores, figure
from psi_kv_governor.bench.twins import CacheType, Twins, anonymous_bytes, differing
from psi_kv_governor.config import load_config
from psi_kv_governor.errors import PsiKvError
from psi_kv_governor.policy.base import Range
from psi_kv_governor.store import Store, open_store

LEAST_TRIMMED = Asked(">=", 0.60, "min")
RETURNED = Asked(">=", 0.95, "min")
RELEASE_SPEED = Asked(">=", 5.0)
IDENTICAL = Asked("<=", 0, "max")
RESTORE_GAIN = Asked(">=", 50.0)

SINK_CELLS = 64
"""Kept at the start of the context, and WINDOW_CELLS at its end, as the governor's defaults do."""
WINDOW_CELLS = 256


class Case(msgspec.Struct, frozen=True):
    """One context and the holes that are made in it."""

    cache: CacheType
    tokens: int
    holes: int

    def __str__(self) -> str:
        return f"{self.cache}, {self.tokens:,} tokens, {self.holes} hole{'s' if self.holes > 1 else ''}"


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """How much is measured. The cases of one cache type and size share a prompt, which is the slow part."""

    cases: tuple[Case, ...]
    share: float = 0.7
    """Of the context that is given up. A hole keeps a part of the page at each end, in the mean one page in
    all: 3 % of 700 rows of the smallest kind (q8_0, 204 bytes)."""
    repeats: int
    recompute_cells: int | None
    """Recomputed and restored: so many cells from the first hole on, or all of it (None)."""
    recompute_repeats: int


FULL = Plan(
    cases=(Case("f16", 4096, 1), Case("f16", 4096, 4), Case("q8_0", 4096, 1), Case("q8_0", 4096, 4)),
    repeats=7,
    recompute_cells=None,
    recompute_repeats=3,
)
# 2,048 tokens have room for fewer holes: see Plan.share.
QUICK = Plan(
    cases=(Case("f16", 4096, 1), Case("f16", 4096, 4), Case("q8_0", 2048, 1), Case("q8_0", 2048, 2)),
    repeats=3,
    recompute_cells=512,
    recompute_repeats=2,
)


def holes_in(tokens: int, share: float, count: int) -> list[Range]:
    """`count` holes of equal size that take `share` of `tokens` in all, evenly between sinks and window.

    The first one begins right after the sinks. Raises PsiKvError when they don't fit.
    """
    room = tokens - SINK_CELLS - WINDOW_CELLS
    size = math.ceil(tokens * share / count)
    gap = (room - size * count) // count
    if size < 1 or gap < (count > 1):
        raise PsiKvError(f"{tokens} tokens have no room for {count} holes of {share:.0%} in all")
    return [
        Range(start, start + size)
        for start in range(SINK_CELLS, SINK_CELLS + count * (size + gap), size + gap)
    ][:count]


def run(options: Options, say: Say = lambda doing: None) -> Report:
    """`psi-kv bench trim`. Raises PsiKvError where the model or the machine can't be measured."""
    plan = QUICK if options.quick else FULL
    if options.repeats is not None:
        plan = msgspec.structs.replace(
            plan, repeats=options.repeats, recompute_repeats=min(options.repeats, plan.recompute_repeats)
        )
    threads = options.threads or cores()
    recorder = Recorder("trim", options, [threads])
    return recorder.report(list(measure(options, plan, threads, say)))


def measure(options: Options, plan: Plan, threads: int, say: Say) -> Iterator[Figure]:
    """The figures of every case of `plan`, those with the same context together."""
    contexts = dict.fromkeys((case.cache, case.tokens) for case in plan.cases)
    for cache, tokens in contexts:
        with (
            _disk_store() as store,
            Twins(options.model, cache, tokens, threads=threads, store=store, say=say) as twins,
        ):
            cases = [case for case in plan.cases if (case.cache, case.tokens) == (cache, tokens)]
            for case in cases:
                yield from _case_figures(twins, case, plan, store, say)
            yield from _comeback_figures(twins, cases[0], plan, store, say)


@contextmanager
def _disk_store() -> Iterator[Store]:
    store = open_store(load_config(store="disk"))
    assert store is not None, "a disk store was asked for"
    try:
        yield store
    finally:
        store.close()


class _Round(msgspec.Struct, frozen=True, kw_only=True):
    """One pass of the first two ways."""

    released_share: float
    release_bytes_per_s: float
    spilled_share: float
    spill_bytes_per_s: float
    restore_bytes_per_s: float
    changed_by_release: int
    """Logits that differ, here and in the next two."""
    unlike_plain_with_holes: int
    unlike_never_trimmed: int


def _case_figures(twins: Twins, case: Case, plan: Plan, store: Store, say: Say) -> Iterator[Figure]:
    holes = holes_in(case.tokens, plan.share, case.holes)
    rounds = []
    for number in range(plan.repeats):
        say(f"{case}: {number + 1} of {plan.repeats}")
        rounds.append(_round(twins, holes, store))

    def of(name: str, unit: str, field: str, asked: Asked | None = None, scale: float = 1.0) -> Figure:
        values = [getattr(passed, field) / scale for passed in rounds]
        return figure(name, unit, values, asked, case=str(case))

    yield figure("trimmed", "share", [_cells(holes) / case.tokens], LEAST_TRIMMED, case=str(case))
    yield of("returned by a release", "share", "released_share", RETURNED)
    yield of("returned by a trim with spilling", "share", "spilled_share", RETURNED)
    yield of("release", "GB/s", "release_bytes_per_s", RELEASE_SPEED, 1e9)
    yield of("trim with spilling", "GB/s", "spill_bytes_per_s", scale=1e9)
    yield of("restore", "GB/s", "restore_bytes_per_s", scale=1e9)
    yield of("logits changed by the release", "logits", "changed_by_release", IDENTICAL)
    yield of("logits unlike plain with these holes", "logits", "unlike_plain_with_holes", IDENTICAL)
    yield of("logits unlike never trimmed, after restore", "logits", "unlike_never_trimmed", IDENTICAL)


def _round(twins: Twins, holes: Sequence[Range], store: Store) -> _Round:
    governed, plain = twins.governed, twins.plain
    hole_bytes = _cells(holes) * twins.engine.cell_bytes

    twins.refill(governed, plain)
    twins.remove(holes)
    by_metadata, with_holes = twins.next_logits(governed), twins.next_logits(plain)
    before = anonymous_bytes()
    began_s = time.perf_counter()
    returned = twins.engine.release()
    release_s = time.perf_counter() - began_s
    released = before - anonymous_bytes()
    after_release = twins.next_logits(governed)

    twins.refill(governed)
    before = anonymous_bytes()
    trimmed = twins.engine.trim(holes, store)
    spilled = before - anonymous_bytes()
    _require_whole(trimmed.problem or ("" if trimmed.spilled == _cells(holes) else "not all was spilled"))
    restored = twins.engine.restore(trimmed.cells, store)
    _require_whole(restored.problem or ("" if not restored.missing else "not all came back"))
    return _Round(
        released_share=released / hole_bytes,
        release_bytes_per_s=returned / release_s,
        spilled_share=spilled / hole_bytes,
        spill_bytes_per_s=hole_bytes / trimmed.seconds,
        restore_bytes_per_s=hole_bytes / restored.seconds,
        changed_by_release=differing(by_metadata, after_release),
        unlike_plain_with_holes=differing(with_holes, after_release),
        unlike_never_trimmed=differing(twins.whole, twins.next_logits(governed)),
    )


def _comeback_figures(twins: Twins, case: Case, plan: Plan, store: Store, say: Say) -> Iterator[Figure]:
    first = holes_in(case.tokens, plan.share, 1)[0]
    part = Range(first.start, min(first.stop, first.start + (plan.recompute_cells or first.cells)))
    restore_s, recompute_s = [], []
    for number in range(plan.recompute_repeats):
        say(f"{case.cache}: recomputing {part.cells:,} cells, {number + 1} of {plan.recompute_repeats}")
        twins.refill(twins.governed)
        twins.engine.trim([part], store)
        restored = twins.engine.restore(part.cells, store)
        _require_whole(restored.problem or ("" if restored.cells == part.cells else "not all came back"))
        restore_s.append(restored.seconds)
        twins.engine.trim([part], None)
        began_s = time.perf_counter()
        _require_whole("not all was recomputed" if twins.governed.make_whole() else "")
        recompute_s.append(time.perf_counter() - began_s)
    what = f"{case.cache}, {part.cells:,} of {case.tokens:,} tokens"
    gains = [slow / fast for slow, fast in zip(recompute_s, restore_s, strict=True)]
    yield figure("recompute", "s", recompute_s, case=what)
    yield figure("restore", "s", restore_s, case=what)
    yield figure("recompute over restore", "x", gains, RESTORE_GAIN, case=what)


def _cells(ranges: Sequence[Range]) -> int:
    return sum(part.cells for part in ranges)


def _require_whole(problem: str) -> None:
    """A step that did less than asked is no measurement."""
    if problem:
        raise PsiKvError(f"the trim could not be measured: {problem}")
