"""Results of scenes that nobody played."""

from __future__ import annotations

from typing import Any

from psi_kv_governor.sandbox.load import MIB
from psikv_bench.messages import Variant
from psikv_bench.pressure.figures import Run
from psikv_bench.pressure.result import Moment, SceneResult
from psikv_bench.watch import Shares


def scene_result(variant: Variant, **changes: Any) -> SceneResult:
    """A plain run of ten seconds; `changes` are fields of SceneResult."""
    plain: dict[str, Any] = {
        "variant": variant,
        "tokens": 100,
        "seconds": 10.0,
        "tokens_per_s": 10.0,
        "calm_tokens_per_s": 30.0,
        "p50_s": 0.1,
        "p99_s": 0.2345,
        "max_s": 0.4,
        "token_s": [0.1] * 100,
        "peak_resident_bytes": 300 * MIB,
        "least_resident_bytes": 150 * MIB,
        "most_swapped_bytes": 90 * MIB,
        "bytes_returned": 0,
        "trims": 0,
        "first_trim_s": None,
        "final_cells": 4000,
        "restored": None,
        "missing_cells": 0,
        "killed": False,
        "neighbour_killed": False,
        "neighbour_bytes_per_s": 1e9,
        "neighbour_work": [(0.0, 0), (10.0, 10_000_000_000)],
        "decoding_from_s": 0.0,
        "stall": 0.25,
        "stall_full": 0.125,
        "outside": Shares(0.2, 0.1),
        "moments": [moment(-0.1), moment(0.0, stage="pressed"), moment(5.0, stage="pressed", tokens=50)],
    }
    return SceneResult(**{**plain, **changes})


def moment(time_s: float, **changes: Any) -> Moment:
    """A look at that run."""
    plain: dict[str, Any] = {
        "time_s": time_s,
        "stage": "calm",
        "inside": Shares(0.25, 0.125),
        "outside": Shares(0.2, 0.1),
        "resident_bytes": 200 * MIB,
        "swap_bytes": 20 * MIB,
        "live_cells": 4000,
        "tokens": 0,
        "token_s": None,
        "neighbour_bytes": int(max(0.0, time_s) * 1e9),
    }
    return Moment(**{**plain, **changes})


def runs(*repeats: dict[Variant, dict[str, Any]]) -> list[Run]:
    """Runs in the order in which they stand; of each variant, what differs from the plain one."""
    played = [
        (repeat, scene_result(variant, **changes))
        for repeat, variants in enumerate(repeats, start=1)
        for variant, changes in variants.items()
    ]
    return [
        Run(number=number, repeat=repeat, result=found) for number, (repeat, found) in enumerate(played, 1)
    ]
