"""Plays the runs by turns and keeps the result after each, so that what is finished is never lost."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec

from psi_kv_governor.bench.messages import Variant
from psi_kv_governor.bench.pressure.figures import figures
from psi_kv_governor.bench.pressure.options import PressureOptions, turns
from psi_kv_governor.bench.pressure.report import save
from psi_kv_governor.bench.pressure.result import PressureResult, Run
from psi_kv_governor.bench.pressure.setting import Setting, is_judged, remarks, scene_of
from psi_kv_governor.bench.record import Options, Recorder
from psi_kv_governor.bench.scene import run_scene
from psi_kv_governor.bench.script import OnEvent, SceneOptions, SceneResult

Play = Callable[[Variant, SceneOptions, OnEvent], SceneResult]
OnRun = Callable[[int, int, Variant], None]
"""Told the number of the run that begins, how many there are, and its variant."""


class Benchmark:
    """One run of the benchmark. `result` is what there is so far, and is on the disk after each run."""

    def __init__(
        self, options: PressureOptions, setting: Setting, folder: Path, play: Play | None = None
    ) -> None:
        """`play` stands in for `run_scene`."""
        self._options, self._setting, self._folder = options, setting, folder
        self._play = play or run_scene
        self._recorder = Recorder("pressure", Options(model=Path(options.model)), [options.threads])
        self._remarks = list(remarks(options, setting))
        self._runs: list[Run] = []

    def play(self, on_event: OnEvent, on_run: OnRun) -> PressureResult:
        """All runs. Whatever ends it early, the runs before it are kept."""
        order = list(self._order())
        self._folder.mkdir(parents=True, exist_ok=True)
        scene = scene_of(self._options, self._setting, self._folder)
        for number, (repeat, variant) in enumerate(order, start=1):
            if number > 1:
                time.sleep(self._options.variant_cooldown_s)
            on_run(number, len(order), variant)
            found = self._play(variant, scene, on_event)
            self._runs.append(Run(number=number, repeat=repeat, result=found))
            save(self._folder, self.result(complete=number == len(order)))
        return self.result(complete=True)

    def _order(self) -> Iterator[tuple[int, Variant]]:
        for repeat, variants in enumerate(turns(self._options), start=1):
            for variant in variants:
                yield repeat, variant

    @property
    def finished(self) -> int:
        """Runs that were played to their end."""
        return len(self._runs)

    def result(self, *, complete: bool) -> PressureResult:
        """What there is so far."""
        found = figures(
            self._runs,
            self._options.variants,
            calm=not self._setting.pressure_bytes,
            judged=is_judged(self._options, self._setting),
        )
        return PressureResult(
            report=self._recorder.report(list(found)),
            complete=complete,
            options=msgspec.structs.replace(self._options, model=Path(self._options.model).name),
            setting=self._setting,
            remarks=self._remarks,
            runs=list(self._runs),
        )
