"""Many short runs without swap: at which ramp of a neighbour the kernel begins to kill."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from psi_kv_governor.config import GovernorConfig, load_config
from psi_kv_governor.control.state import BUDGET_WINDOW_S
from psi_kv_governor.events import Trimmed
from psi_kv_governor.sandbox.load import MIB
from psi_kv_governor.sandbox.process_memory import glance
from psikv_bench import oom_report
from psikv_bench.journal import remaining
from psikv_bench.messages import Variant
from psikv_bench.oom_report import Trial, rate_words
from psikv_bench.options import each_once, in_order
from psikv_bench.record import Recorder, Report, flat
from psikv_bench.scene import Scene
from psikv_bench.trials.serving import Onset, Serving
from psikv_bench.trials.sizing import (
    Need,
    Sizes,
    TrialOptions,
    deadly,
    kill_excess,
    prepared,
    require_sandbox,
    trimmed_bytes,
)
from psikv_bench.worker import Worker

CALM_S = 0.5
"""Decoded in peace before the neighbour comes."""
_LOOK_S = 0.01
_STUCK_S = 30.0
"""Past the time that the ramp and the hold take. A cgroup at its limit can thrash for minutes without a
kill."""

Rate = Annotated[float, Meta(ge=0)]


class OomOptions(TrialOptions, frozen=True, kw_only=True):
    """What is asked for."""

    runs: Annotated[int, Meta(ge=1, description="In all, over all variants and rates.")] = 20
    variants: Annotated[tuple[Variant, ...], Meta(description="Which of them.")] = ("fixed", "psi")
    rates: Annotated[tuple[Rate, ...], Meta(description="Ramps, MB/s; 0: as fast as it can.")] = (
        10.0, 25.0, 50.0, 100.0, 200.0, 400.0, 800.0, 0.0,
    )  # fmt: skip
    mmap: Annotated[bool, Meta(description="Weights as a mapped file, or in memory [mapped].")] = True
    seed: Annotated[int, Meta(description="Of the order of the rates.")] = 1

    def check(self) -> None:
        each_once("rates", self.rates)
        each_once("variants", self.variants)


def schedule(options: OomOptions) -> Iterator[tuple[Variant, float]]:
    """The runs in their order: rounds of all rates, each by one variant and then by the next.

    The variant that begins changes from round to round, the order of the rates is drawn by the seed, and
    all variants go through the same one. A last round that is not whole has some of the rates, for all.
    """
    variants = in_order(options.variants)
    left = options.runs
    number = 0
    while left > 0:
        rates = random.Random(f"{options.seed} {number}").sample(options.rates, len(options.rates))
        rates = rates[: -(-left // len(variants))]
        first = number % len(variants)
        for variant in variants[first:] + variants[:first]:
            for rate in rates[:left]:
                yield variant, rate
            left -= min(left, len(rates))
        number += 1


def run(recorder: Recorder[OomOptions]) -> Report:
    """Run what is not yet in the journal, and report on all of it. Ctrl-C keeps the finished runs."""
    asked = recorder.options
    require_sandbox(asked.swap)
    journal = recorder.journal(Trial, msgspec.structs.replace(asked, model="", runs=1))
    trials: list[Trial] = journal.parts
    # A shorter schedule ended with a round of its own.
    ahead = remaining(schedule(asked), [(trial.variant, trial.rate) for trial in trials])
    scene: dict[str, Any] | None = None
    notes: list[str] = []
    if ahead:
        config = load_config()
        with prepared(asked.setup(mmap=asked.mmap), recorder.say) as (ready, need):
            # What was begun goes on in cgroups of the same size: measured again, it could differ by a MiB.
            sizes = trials[0].sizes if trials else deadly(need, config, *asked.given_bytes)
            over, under = kill_excess(need, sizes), trimmed_bytes(need, config, sizes)
            scene = {"need": need, "sizes": sizes, "kill_excess_bytes": over, "trimmed_bytes": under}
            notes.append(
                f"the cgroup has {sizes.limit_bytes // MIB} MiB and the load {sizes.load_bytes // MIB}: "
                f"without one page of the weights the whole cache and the load {_over(over, 'the limit')}; a "
                f"cache at its floor, the weights and the load {_over(-under, 'the low line')}"
            )
            with closing(Serving(ready, need, sizes, asked.swap, recorder.say)) as serving:
                runner = _Runner(serving, need, sizes, asked, config)

                def one(what: tuple[Variant, float]) -> Trial:
                    number, killed = len(trials) + 1, sum(trial.died for trial in trials)
                    said = f"run {number} of {asked.runs}: {what[0]}, {rate_words(what[1])}"
                    recorder.say(f"{said}; {killed} killed so far", new=True)
                    return runner.run(number, *what)

                journal.play(ahead, one)
    report = recorder.report(
        list(oom_report.figures(trials, without_swap=asked.swap == "none")),
        [asked.threads or 1],
        options={"scene": scene},
        interrupted=journal.interrupted,
        tables=oom_report.tables(trials),
        notes=[*notes, *oom_report.notes(trials)],
        rows=msgspec.to_builtins(oom_report.cells(trials)),
    )
    return recorder.save(report, flat(trials), partial(oom_report.plot, trials=trials))


def _over(n_bytes: int, what: str) -> str:
    how, side = ("are", "over") if n_bytes > 0 else ("stay", "under")
    return f"{how} {abs(n_bytes) / MIB:.0f} MiB {side} {what}"


class _Runner:
    """Runs trials one after the other; a model that came back whole serves the next one of its variant."""

    def __init__(
        self, serving: Serving, need: Need, sizes: Sizes, options: OomOptions, config: GovernorConfig
    ) -> None:
        self._serving, self._need, self._sizes = serving, need, sizes
        self._hold_s, self._budget_per_min = options.hold_s, config.budget_per_min

    def run(self, number: int, variant: Variant, rate: float) -> Trial:
        """One trial. Raises PsiKvError where the model can't be run at all."""
        host = self._serving.ready(variant, self._has_budget)
        onset = Onset(host, self._serving, _LOOK_S)
        with onset.watcher:
            host.order(Worker.decode_on)
            onset.listen(CALM_S)
            over = onset.press(self._sizes.load_bytes, rate, self._hold_s, self._hold_s + _STUCK_S)
        killed, back = onset.killed, onset.back()
        held = None if killed else glance(host.pid)
        why = self._serving.make_whole(host) if over and not killed else ""
        whole = over and not killed and not why
        if not whole:
            killed = self._serving.give_up(host) or killed  # also while its context came back
        return Trial(
            number=number,
            variant=variant,
            rate=rate,
            sizes=self._sizes,
            model_killed=killed,
            neighbour_killed=onset.neighbour_killed,
            stuck=not over,
            seconds=onset.ended_s - onset.began_s,
            token_s=_token_s(onset),
            peak_bytes=max((look.memory.peak_bytes for look in onset.watcher.looks), default=0),
            held_bytes=None if held is None else held.resident_bytes,
            returned_bytes=sum(event.bytes_returned for event in back),
            trims=sum(isinstance(event, Trimmed) for event in back),
            first_returned_s=back[0].time_s - onset.began_s if back else None,
            whole=None if killed else whole,
            not_whole="" if killed else why,
            trail=list(onset.trail) if onset.killed or onset.neighbour_killed else [],
        )

    def _has_budget(self) -> bool:
        """Whether a whole context may still be given up in this minute.

        A process that has used up the minute's budget of cells would stand the next trial without a
        governor: that is the guard against a hostile neighbour, and not what is measured here.
        """
        now_s = time.monotonic()
        spent = sum(cells for time_s, cells in self._serving.given_up if now_s - time_s <= BUDGET_WINDOW_S)
        return spent <= (self._budget_per_min - 1.0) * self._need.context_tokens


def _token_s(onset: Onset) -> list[float]:
    """Of tokens since the neighbour's first byte. One that never came took at least until the end."""
    done = [token.seconds for token in onset.tokens if token.time_s >= onset.began_s]
    last_s = onset.tokens[-1].time_s if onset.tokens else onset.began_s
    waited_s = 0.0 if onset.killed else onset.ended_s - last_s
    return [*done, waited_s] if waited_s > max(done, default=0.0) else done


SCENE = Scene(
    about="""Many short runs in a memory cgroup without swap: kills by variant and ramp.

    A neighbour takes memory at a set rate while the model decodes. Ctrl-C keeps the finished runs.
    """,
    options=OomOptions(),
    # With the weights in memory a context of 2,048 tokens is enough, which is decoded in half a minute.
    quick=OomOptions(ctx=2048, runs=6, rates=(50.0, 200.0, 0.0), hold_s=1.0, mmap=False),
    run=run,
    examples=(
        "psi-kv bench oom --quick",
        "psi-kv bench oom --variants fixed,psi-file,psi-memory,file-only --runs 1000 --out-dir oom",
        "psi-kv bench oom --runs 1000 --out-dir oom --resume",
    ),
)
