"""What comes of a scene, from what was seen of it."""

from __future__ import annotations

from dataclasses import dataclass

from msgspec.structs import replace

from psi_kv_governor.bench import messages
from psi_kv_governor.bench.messages import Variant
from psi_kv_governor.bench.sampling import Sample, percentile
from psi_kv_governor.bench.script import SceneResult
from psi_kv_governor.bench.watch import Span, Watch, amount_at


@dataclass(kw_only=True)
class Ending:
    """How far a scene came, noted as it goes."""

    variant: Variant
    calm_tokens_per_s: float = 0.0
    seconds: float | None = None
    """Of decoding under pressure, by the model's own clock; None: it was killed before it could tell."""
    final_cells: int = 0
    neighbour_killed: bool = False
    settled: messages.Settled | None = None
    """None: it was killed."""
    final: Sample | None = None


def result_of(ending: Ending, pressed: Span, watch: Watch) -> SceneResult:
    """The figures of a scene that is over."""
    seconds = pressed.seconds if ending.seconds is None else ending.seconds
    token_s, settled = watch.token_s, ending.settled
    zero_s = watch.work[0][0] if watch.work else pressed.begin_s
    beside = [moment for moment in watch.moments if pressed.begin_s <= moment.time_s <= pressed.end_s]
    restored = None if not watch.trim_s else settled is not None and settled.missing_cells == 0
    return SceneResult(
        variant=ending.variant,
        tokens=len(token_s),
        seconds=seconds,
        tokens_per_s=len(token_s) / seconds,
        calm_tokens_per_s=ending.calm_tokens_per_s,
        p50_s=percentile(token_s, 0.5) if token_s else None,
        p99_s=percentile(token_s, 0.99) if token_s else None,
        max_s=max(token_s, default=None),
        token_s=list(token_s),
        peak_resident_bytes=watch.peak_bytes,
        final_resident_bytes=0 if ending.final is None else ending.final.resident_bytes,
        least_resident_bytes=min((moment.resident_bytes for moment in beside), default=0),
        most_swapped_bytes=max((moment.swap_bytes for moment in beside), default=0),
        bytes_returned=watch.returned_bytes,
        trims=len(watch.trim_s),
        first_trim_s=watch.trim_s[0] - zero_s if watch.trim_s and watch.work else None,
        final_cells=ending.final_cells,
        restored=restored,
        missing_cells=0 if settled is None else settled.missing_cells,
        restore_s=0.0 if settled is None else settled.seconds,
        restored_by_hand=settled is not None and settled.by_hand,
        killed=settled is None,
        neighbour_killed=ending.neighbour_killed,
        neighbour_bytes_per_s=_work_rate(watch, pressed),
        neighbour_work=[(time_s - zero_s, done) for time_s, done in watch.work],
        decoding_from_s=pressed.begin_s - zero_s,
        stall=None if pressed.inside is None else pressed.inside.some,
        stall_full=None if pressed.inside is None else pressed.inside.full,
        outside=pressed.outside,
        moments=[replace(moment, time_s=moment.time_s - zero_s) for moment in watch.moments],
    )


def _work_rate(watch: Watch, pressed: Span) -> float | None:
    if not watch.work:
        return None
    done = amount_at(watch.work, pressed.end_s) - amount_at(watch.work, pressed.begin_s)
    return done / pressed.seconds
