"""Many short runs without swap: at which ramp of a neighbour the kernel begins to kill."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Annotated

import msgspec
from msgspec import Meta

from psi_kv_governor.config import GovernorConfig, load_config
from psi_kv_governor.control.state import BUDGET_WINDOW_S
from psi_kv_governor.errors import PsiKvError
from psi_kv_governor.events import Trimmed
from psi_kv_governor.sandbox import messages
from psi_kv_governor.sandbox.host import MIB
from psi_kv_governor.sandbox.messages import Setup, Variant
from psi_kv_governor.sandbox.process_memory import glance
from psi_kv_governor.sandbox.sandbox import Swap
from psikv_bench import oom_report
from psikv_bench.oom_trial import Trial, rate_words
from psikv_bench.options import Options, each_once, in_order
from psikv_bench.record import Recorder, Report
from psikv_bench.scene import Scene
from psikv_bench.trials.serving import SPARE_TOKENS, Onset, Place, Serving
from psikv_bench.trials.sizing import Need, Sizes, deadly, prepared, require_sandbox

CALM_S = 0.5
"""Decoded in peace before the neighbour comes."""
SWAP_BYTES = 512 * MIB
_LOOK_S = 0.01
_STUCK_S = 30.0
"""Past the time that the ramp and the hold take. A cgroup at its limit can thrash for minutes without a
kill."""

Rate = Annotated[float, Meta(ge=0)]


class OomOptions(Options, frozen=True, kw_only=True):
    """What is asked for. None: worked out from what the model takes."""

    runs: Annotated[int, Meta(ge=1, description="In all, over all variants and rates.")] = 20
    variants: Annotated[tuple[Variant, ...], Meta(description="Which of them.")] = ("fixed", "psi")
    rates: Annotated[tuple[Rate, ...], Meta(description="Ramps, MB/s; 0: as fast as it can.")] = (
        10.0, 25.0, 50.0, 100.0, 200.0, 400.0, 800.0, 0.0,
    )  # fmt: skip
    ctx: Annotated[int, Meta(ge=1, description="Tokens in the context.")] = 8192
    limit_mib: (
        Annotated[int, Meta(ge=1, description="Of the cgroup [worked out from what the model takes].")] | None
    ) = None
    load_mib: (
        Annotated[
            int, Meta(ge=1, description="What the neighbour takes [so that only a trimmed cache fits].")
        ]
        | None
    ) = None
    hold_s: Annotated[float, Meta(ge=0, description="How long the load is held.")] = 2.0
    swap: Annotated[Swap, Meta(description="Inside of the cgroup.")] = "none"
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


def remaining(options: OomOptions, done: Iterable[tuple[Variant, float]]) -> Iterator[tuple[Variant, float]]:
    """What of the schedule is not among those `done`: a shorter schedule ends with a round of its own."""
    counts = Counter(done)
    for run_of in schedule(options):
        if counts[run_of]:
            counts[run_of] -= 1
        else:
            yield run_of


def run(recorder: Recorder[OomOptions]) -> Report:
    """Run what is not yet in the journal, and report on all of it. Ctrl-C keeps the finished runs."""
    asked = recorder.options
    require_sandbox(asked.swap)
    journal = recorder.journal(Trial, msgspec.structs.replace(asked, model="", runs=1))
    trials: list[Trial] = journal.parts
    ahead = list(remaining(asked, [(trial.variant, trial.rate) for trial in trials]))
    scene, interrupted = None, False
    config = load_config()
    if ahead:
        setup = Setup(
            variant="fixed",
            model=asked.model,
            context_tokens=asked.ctx,
            decoded_tokens=SPARE_TOKENS,
            threads=asked.threads or 1,
            mmap=asked.mmap,
        )
        with prepared(setup, recorder.say) as (ready, need):
            # What was begun goes on in cgroups of the same size: measured again, it could differ by a MiB.
            sizes = trials[0].sizes if trials else _sizes(asked, need, config)
            scene = oom_report.InScene.of(need, sizes, config)
            place = Place(sizes, asked.swap, SWAP_BYTES)
            with Serving(ready, need, place, recorder.say) as serving:
                runner = _Runner(serving, need, sizes, asked, config)
                try:
                    for number, (variant, rate) in enumerate(ahead, len(trials) + 1):
                        killed = sum(trial.died for trial in trials)
                        what = f"run {number} of {asked.runs}: {variant}, {rate_words(rate)}"
                        recorder.say(f"{what}; {killed} killed so far", new=True)
                        journal.add(runner.run(number, variant, rate))
                except KeyboardInterrupt:
                    interrupted = True
    if not trials:
        raise PsiKvError("interrupted before the first run was finished: there is nothing to report")
    report = oom_report.report_of(recorder, trials, scene, interrupted=interrupted)
    return recorder.save(report, oom_report.records(trials), lambda folder: oom_report.plot(folder, trials))


def _sizes(asked: OomOptions, need: Need, config: GovernorConfig) -> Sizes:
    limit, load = (None if mib is None else mib * MIB for mib in (asked.limit_mib, asked.load_mib))
    return deadly(need, config, limit, load)


class _Runner:
    """Runs trials one after the other; a model that came back whole serves the next one of its variant."""

    def __init__(
        self, serving: Serving, need: Need, sizes: Sizes, options: OomOptions, config: GovernorConfig
    ) -> None:
        self._serving, self._need, self._sizes = serving, need, sizes
        self._options, self._config = options, config

    def run(self, number: int, variant: Variant, rate: float) -> Trial:
        """One trial. Raises PsiKvError where the model can't be run at all."""
        host, fresh = self._serving.ready(variant, self._has_budget)
        with Onset(host, self._serving, _LOOK_S) as onset:
            host.order(messages.Decode())
            onset.listen(CALM_S)
            over = onset.press(
                self._sizes.load_bytes,
                rate,
                lambda: onset.host.said_at("taken") is not None and onset.held_s() >= self._options.hold_s,
                self._options.hold_s + _STUCK_S,
            )
        outcome = self._outcome(onset, rate, stuck=not over)
        began_s = time.monotonic()
        killed = onset.killed
        why = self._serving.make_whole(host) if over and not killed else ""
        back = over and not killed and not why
        if not back:
            killed = self._serving.give_up(host) or killed  # also while its context came back
        return msgspec.structs.replace(
            outcome,
            number=number,
            variant=variant,
            fresh=fresh,
            model_killed=killed,
            whole=None if killed else back,
            not_whole="" if killed else why,
            whole_s=time.monotonic() - began_s if back else None,
        )

    def _has_budget(self) -> bool:
        """Whether a whole context may still be given up in this minute.

        A process that has used up the minute's budget of cells would stand the next trial without a
        governor: that is the guard against a hostile neighbour, and not what is measured here.
        """
        now_s = time.monotonic()
        spent = sum(cells for time_s, cells in self._serving.given_up if now_s - time_s <= BUDGET_WINDOW_S)
        return spent <= (self._config.budget_per_min - 1.0) * self._need.context_tokens

    def _outcome(self, onset: Onset, rate: float, *, stuck: bool) -> Trial:
        began_s, ended_s, looks = onset.began_s, onset.ended_s, onset.watcher.looks
        pressed = [look for look in looks if look.time_s >= began_s]
        back = onset.back()
        final = None if onset.killed else glance(onset.host.pid)
        stalls_us = [look.inside.some_us for look in pressed if look.inside is not None]
        return Trial(
            number=0,
            variant="fixed",
            rate=rate,
            sizes=self._sizes,
            fresh=False,
            model_killed=onset.killed,
            neighbour_killed=onset.neighbour_killed,
            stuck=stuck,
            seconds=ended_s - began_s,
            taken_bytes=max((line.taken_bytes for line in onset.host.said), default=0),
            token_s=_token_s(onset.tokens, began_s, ended_s, onset.killed),
            peak_bytes=max((look.memory.peak_bytes for look in looks), default=0),
            held_bytes=None if final is None else final.resident_bytes,
            returned_bytes=sum(event.bytes_returned for event in back),
            trims=sum(isinstance(event, Trimmed) for event in back),
            first_returned_s=back[0].time_s - began_s if back else None,
            least_headroom_bytes=min((look.headroom_bytes for look in pressed), default=0),
            stall_s=(stalls_us[-1] - stalls_us[0]) / 1e6 if stalls_us else 0.0,
            whole=None,
            whole_s=None,
            trail=list(onset.trail) if onset.killed or onset.neighbour_killed else [],
        )


def _token_s(tokens: Sequence[messages.Token], began_s: float, ended_s: float, killed: bool) -> list[float]:
    """Of tokens since the neighbour's first byte. One that never came took at least until the end."""
    done = [token.seconds for token in tokens if token.time_s >= began_s]
    last_s = tokens[-1].time_s if tokens else began_s
    waits = [] if killed else [ended_s - last_s]
    return done + [wait for wait in waits if wait > max(done, default=0.0)]


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
