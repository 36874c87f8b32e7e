"""One scene under one load, by turns: fixed cache, reference method, governor, each as asked for."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial

import msgspec

from psi_kv_governor.cli._event_words import words_of
from psi_kv_governor.errors import PsiKvError
from psi_kv_governor.sandbox.scene_options import STAGES
from psikv_bench.messages import Governed, Message, Progress, Stage, Token, Variant
from psikv_bench.pressure import figures as of_runs
from psikv_bench.pressure import plots
from psikv_bench.pressure.figures import Run
from psikv_bench.pressure.options import PressureOptions, turns
from psikv_bench.pressure.preflight import check_memory, checks
from psikv_bench.pressure.result import SceneResult
from psikv_bench.pressure.scene import OnMessage, SceneOptions, run_scene
from psikv_bench.pressure.setting import Setting, choose_setting, is_judged, remarks, scene_of
from psikv_bench.record import Recorder, Report, Say
from psikv_bench.scene import Scene

Play = Callable[[Variant, SceneOptions, OnMessage], SceneResult]


def run(recorder: Recorder[PressureOptions], play: Play = run_scene) -> Report:
    """All runs by turns; what is finished is on the disk after each. Ctrl-C keeps the finished runs.

    `play` stands in for `run_scene`. Raises PsiKvError where the machine has not the memory.
    """
    options = recorder.options
    # Another number of repeats goes on with the same experiment.
    journal = recorder.journal(Run, msgspec.structs.replace(options, model="", repeats=1))
    setting = choose_setting(options, recorder.say)
    memory = check_memory(setting)
    if memory.state == "fail":
        raise PsiKvError(f"{memory.detail}: {memory.remedy}")
    scene = scene_of(options, setting, recorder.folder)
    runs: list[Run] = journal.parts
    ahead = [(repeat, variant) for repeat, order in enumerate(turns(options), 1) for variant in order]

    def one(what: tuple[int, Variant]) -> Run:
        repeat, variant = what
        number = len(runs) + 1
        if runs:
            time.sleep(options.variant_cooldown_s)
        recorder.say(f"run {number} of {len(ahead)}: {variant}", new=True)
        found = play(variant, scene, _Saying(variant, recorder.say))
        return Run(number=number, repeat=repeat, result=found)

    journal.play(ahead[len(runs) :], one)
    return _report(recorder, setting, runs, interrupted=journal.interrupted)


class _Saying:
    """Says what goes on in a scene."""

    def __init__(self, variant: Variant, say: Say) -> None:
        self._variant, self._say = variant, say
        self._stage: Stage = "load"

    def __call__(self, message: Message) -> None:
        if isinstance(message, Progress):
            begins = message.stage != self._stage or message.stage == "load"
            self._stage = message.stage
            if begins:
                self._say(f"{self._variant}: {STAGES[message.stage]}", new=True)
        elif isinstance(message, Governed):
            self._say(f"{self._variant}: {words_of(message.event)}", new=True)
        elif isinstance(message, Token) and message.tokens == 1:
            self._say(f"{self._variant}: {STAGES[self._stage]}, {1.0 / message.seconds:.1f} tokens a second")


def _report(
    recorder: Recorder[PressureOptions], setting: Setting, runs: Sequence[Run], *, interrupted: bool
) -> Report:
    options = recorder.options
    found = list(
        of_runs.figures(
            runs,
            options.variants,
            calm=not setting.pressure_bytes,
            judged=is_judged(options, setting),
        )
    )
    title = of_runs.scene_words(options, setting, recorder.model.name)
    report = recorder.report(
        [one for one in found if one.asked or one.case == of_runs.RATIOS],  # the rest is in the tables
        [options.threads or 1],
        options={"setting": setting},
        interrupted=interrupted,
        tables=of_runs.tables(runs, found),
        notes=[*remarks(options, setting), *of_runs.circumstances(options, setting, recorder.model.name)],
        rows=of_runs.rows(runs),
    )
    return recorder.save(report, of_runs.samples(runs), partial(plots.timeline, runs=runs, title=title))


SCENE = Scene(
    about="""A model decodes while a neighbour takes memory: fixed cache, reference method, governor.

    Each run has a memory cgroup and a swap device of its own, which are gone at the end, however it comes.
    Needs root or a delegated cgroup. Ctrl-C keeps the runs that are finished.
    """,
    options=PressureOptions(),
    quick=PressureOptions(repeats=1),
    run=run,
    checks=checks,
    keeps=True,
    examples=(
        "psi-kv bench pressure --preflight-only",
        "psi-kv bench pressure --variants fixed,reference,psi-file,psi-memory,file-only",
        "psi-kv bench pressure --variant-order random --repeats 7 --out-dir out/random",
        "psi-kv bench pressure --load ramp --pressure-rate-mib-s 50 --swap none",
        "psi-kv bench pressure --pressure-mib 0 -n 400 --variants fixed,psi",
    ),
)
