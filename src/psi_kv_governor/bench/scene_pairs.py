"""The demo's scene again and again, ungoverned and governed by turns: what the governor is worth."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import msgspec

from psi_kv_governor.bench.messages import Variant
from psi_kv_governor.bench.pen import Pen
from psi_kv_governor.bench.record import Asked, Figure, Options, Recorder, Report, Say, figure
from psi_kv_governor.bench.scene import run_scene
from psi_kv_governor.bench.script import SceneEvent, SceneOptions, SceneResult, StageChanged
from psi_kv_governor.errors import PsiKvError

SPEED_GAIN = Asked(">=", 2.0)
P99_SHARE = Asked("<", 1.0)

MB = 1_000_000

Pair = tuple[SceneResult, SceneResult]
"""Ungoverned, governed."""


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """How much is measured."""

    pairs: int
    decode_max_s: float
    """Of each run, which may come to a stand."""


FULL = Plan(pairs=5, decode_max_s=120.0)
QUICK = Plan(pairs=1, decode_max_s=45.0)


def run(options: Options, say: Say = lambda doing: None) -> Report:
    """`psi-kv bench scene`. Raises PsiKvError where no pen with zram can be made, or the model can't run."""
    able, why = Pen.available("zram")
    if not able:
        raise PsiKvError(f"the scene needs a memory cgroup and zram of its own: {why}")
    plan = QUICK if options.quick else FULL
    if options.repeats is not None:
        plan = msgspec.structs.replace(plan, pairs=options.repeats)
    scene = SceneOptions(
        model=str(options.model), decode_max_s=plan.decode_max_s, threads=options.threads or 1
    )
    recorder = Recorder("scene", options, [scene.threads])
    pairs = []
    for number in range(plan.pairs):
        say(f"pair {number + 1} of {plan.pairs}")
        pairs.append(pair_of(number, lambda variant: run_scene(variant, scene, _follow(say))))
    return recorder.report(list(figures(pairs)))


def pair_of(number: int, play: Callable[[Variant], SceneResult]) -> Pair:
    """Pair `number`. Every second one is played the other way round: a drift of the machine hits both."""
    order: tuple[Variant, Variant] = ("psi", "fixed") if number % 2 else ("fixed", "psi")
    found = {variant: play(variant) for variant in order}
    return found["fixed"], found["psi"]


def _follow(say: Say) -> Callable[[SceneEvent], None]:
    def follow(event: SceneEvent) -> None:
        if isinstance(event, StageChanged):
            name = "governed" if event.variant == "psi" else "ungoverned"
            say(f"{name}: {event.stage}, {event.done:,} of {event.total:,}")

    return follow


def figures(pairs: Sequence[Pair]) -> Iterator[Figure]:
    """What came of the pairs. A ratio is of the two runs of one pair."""
    yield figure("governed over ungoverned speed", "x", [_speed_gain(pair) for pair in pairs], SPEED_GAIN)
    yield figure("governed over ungoverned p99", "x", [_p99_share(pair) for pair in pairs], P99_SHARE)
    for index, case in enumerate(("ungoverned", "governed")):
        runs = [pair[index] for pair in pairs]
        yield figure("speed", "tokens/s", [found.tokens_per_s for found in runs], case=case)
        yield figure("speed in peace", "tokens/s", [found.calm_tokens_per_s for found in runs], case=case)
        yield figure("p50", "ms", [1e3 * _or_all(found, found.p50_s) for found in runs], case=case)
        yield figure("p99", "ms", [1e3 * _or_all(found, found.p99_s) for found in runs], case=case)
        yield figure("most in swap", "MB", [found.most_swapped_bytes / MB for found in runs], case=case)
        yield figure("killed", "runs", [float(found.killed) for found in runs], case=case)
    governed = [pair[1] for pair in pairs]
    yield figure("returned", "MB", [found.bytes_returned / MB for found in governed], case="governed")
    yield figure("missing at the end", "cells", [found.missing_cells for found in governed], case="governed")
    firsts = [found.first_trim_s for found in governed if found.first_trim_s is not None]
    if firsts:
        yield figure("first trim after", "s", firsts, case="governed")


def _speed_gain(pair: Pair) -> float:
    """Where not one token was decoded, less than one was: the gain is at least this."""
    ungoverned, governed = pair
    return governed.tokens_per_s / max(ungoverned.tokens_per_s, 1 / ungoverned.seconds)


def _p99_share(pair: Pair) -> float:
    ungoverned, governed = pair
    return _or_all(governed, governed.p99_s) / _or_all(ungoverned, ungoverned.p99_s)


def _or_all(found: SceneResult, seconds: float | None) -> float:
    """Where not one token was decoded, the first took longer than all of the time."""
    return found.seconds if seconds is None else seconds
