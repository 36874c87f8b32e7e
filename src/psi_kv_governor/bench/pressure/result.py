"""What is kept of a benchmark."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from psi_kv_governor.bench.messages import Variant
from psi_kv_governor.bench.pressure.options import PressureOptions
from psi_kv_governor.bench.pressure.setting import Setting
from psi_kv_governor.bench.record import Report
from psi_kv_governor.bench.script import SceneResult


class Run(msgspec.Struct, frozen=True, kw_only=True):
    """One variant in one repeat."""

    number: int
    """From 1, in the order in which they were played."""
    repeat: int
    """From 1."""
    result: SceneResult

    @property
    def variant(self) -> Variant:
        """Which of them it is."""
        return self.result.variant


class PressureResult(msgspec.Struct, frozen=True, kw_only=True):
    """The whole of it, as it is kept in JSON."""

    report: Report
    """The circumstances, and the figures with what was asked of them."""
    complete: bool
    """Whether all runs were played."""
    options: PressureOptions
    setting: Setting
    remarks: list[str]
    runs: list[Run]

    def to_json(self) -> bytes:
        """Indented. The looks at each run are left to samples.csv."""
        shown: dict[str, Any] = msgspec.to_builtins(self)
        for run in shown["runs"]:
            del run["result"]["moments"]
        return msgspec.json.format(msgspec.json.encode(shown), indent=2) + b"\n"


def whole_repeats(runs: Sequence[Run], variants: Sequence[Variant]) -> list[dict[Variant, SceneResult]]:
    """The repeats in which every variant was played, by variant."""
    by_repeat: dict[int, dict[Variant, SceneResult]] = {}
    for run in runs:
        by_repeat.setdefault(run.repeat, {})[run.variant] = run.result
    return [found for _, found in sorted(by_repeat.items()) if set(found) == set(variants)]
