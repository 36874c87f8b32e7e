"""`psi-kv bench latency`: the onsets from the options to the report."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec

from psi_kv_governor.bench.messages import Variant
from psi_kv_governor.bench.record import Asked, Figure, Options, Recorder, Say, figure
from psi_kv_governor.bench.sampling import percentile
from psi_kv_governor.bench.trials import plots
from psi_kv_governor.bench.trials.host import Setup
from psi_kv_governor.bench.trials.journal import Plan
from psi_kv_governor.bench.trials.keep import Table, TrialsReport, opened, save
from psi_kv_governor.bench.trials.latency import LIFTED_BUDGET_PER_MIN, Runner
from psi_kv_governor.bench.trials.latency_plan import POLLS_S, LatencyOptions, Mode, Onset
from psi_kv_governor.bench.trials.oom_plan import NAMES
from psi_kv_governor.bench.trials.sizing import mild, prepared
from psi_kv_governor.config import load_config
from psi_kv_governor.errors import PsiKvError

P50_DECODE = Asked("<=", 150)
P99_DECODE = Asked("<=", 400)
QUICK = LatencyOptions(context_tokens=1536, onsets=3, control=1, hold_s=1.0, hold_max_s=5.0)


def run(
    options: Options,
    asked: LatencyOptions,
    folder: Path | None,
    say: Say = lambda doing: None,
    *,
    resume: bool,
) -> TrialsReport:
    """Run what is not yet in the journal of `folder`, and report. Raises BadInputError or PsiKvError."""
    plan = Plan.of("latency", options.model, msgspec.structs.replace(asked, onsets=1))
    journal = opened(folder, "onsets.jsonl", plan, Onset, swap=asked.swap, resume=resume)
    recorder = Recorder("latency", options, [asked.threads])
    setup = Setup(
        model=str(options.model),
        context_tokens=asked.context_tokens,
        prompt_tokens=asked.prompt_tokens if "prefill" in asked.modes else 0,
        threads=asked.threads,
        budget_per_min=LIFTED_BUDGET_PER_MIN,
    )
    config = load_config()
    interrupted = False
    with prepared(setup, say) as (ready, need):
        sizes = mild(need, config, asked.limit_bytes, asked.load_bytes)
        with Runner(ready, need, sizes, asked, config=config, say=say) as runner:
            try:
                for number, mode, variant in list(_order(asked))[len(journal.parts) :]:
                    say(f"{mode}, {NAMES[variant]}: onset {number} of {asked.onsets}")
                    journal.add(runner.run(number, mode, variant))
            except KeyboardInterrupt:
                interrupted = True
    if not journal.parts:
        raise PsiKvError("interrupted before the first onset was finished: there is nothing to report")
    onsets = journal.parts
    report = TrialsReport.of(
        recorder,
        list(figures(onsets)),
        options={"asked": asked, "sizes": sizes, "need": need},
        interrupted=interrupted,
        tables=[reaction_table(onsets), jitter_table(onsets)],
        notes=notes(onsets, asked),
        rows=msgspec.to_builtins(list(onsets)),
    )
    if folder is not None:
        save(report, folder, "onsets.csv", records(onsets), plots.drawn(plots.reactions, onsets))
    return report


def _order(asked: LatencyOptions) -> Iterator[tuple[int, Mode, Variant]]:
    """The modes by turns, and the ungoverned onsets first: more onsets can be added at the end."""
    for number in range(1, asked.control + 1):
        yield from ((number, mode, "fixed") for mode in asked.modes)
    for number in range(1, asked.onsets + 1):
        yield from ((number, mode, "psi") for mode in asked.modes)


def of(onsets: Sequence[Onset], mode: str, variant: Variant) -> list[Onset]:
    """Those of one mode and one variant."""
    return [onset for onset in onsets if (onset.mode, onset.variant) == (mode, variant)]


def _known(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def figures(onsets: Sequence[Onset]) -> Iterator[Figure]:
    """Reaction in each mode, beside what is asked while tokens are decoded."""
    for mode in _modes(onsets):
        values = [1e3 * seconds for seconds in _known(one.reaction_s for one in of(onsets, mode, "psi"))]
        if not values:
            continue
        asked = mode == "decode"
        yield figure("bytes back, p50", "ms", values, P50_DECODE if asked else None, case=mode)
        p99 = percentile(values, 0.99)
        yield figure("bytes back, p99", "ms", [p99], P99_DECODE if asked else None, case=mode)
        yield figure("bytes back, worst", "ms", [max(values)], case=mode)
        since_byte = [1e3 * seconds for seconds in _known(one.returned_s for one in of(onsets, mode, "psi"))]
        yield figure("the same from the neighbour's first byte, p50", "ms", since_byte, case=mode)
        yield figure("and p99", "ms", [percentile(since_byte, 0.99)], case=mode)


def reaction_table(onsets: Sequence[Onset]) -> Table:
    """The governor's reaction and the pollers', by mode, from the first sign and from the first byte."""
    rows = []
    for mode in _modes(onsets):
        mine, control = of(onsets, mode, "psi"), of(onsets, mode, "fixed")
        if mine:
            early = str(sum(one.before_sign for one in mine))
            since_sign, since_byte = [one.reaction_s for one in mine], [one.returned_s for one in mine]
            rows.append(_row(mode, "governor, bytes back", mine, early, since_sign, since_byte))
            fell = [one.fell_s for one in mine]
            since_sign = [_after(one.signal_s, one.fell_s) for one in mine]
            rows.append(_row(mode, "governor, first byte back", mine, "", since_sign, fell))
        for who, some in (("governed", mine), ("ungoverned", control)):
            for number, poll_s in enumerate(POLLS_S) if some else ():
                since_sign = [one.polled_reaction_s(number) for one in some]
                since_byte = [one.poll_s[number] for one in some]
                words = f"poll avg10 every {poll_s:g} s, {who}"
                rows.append(_row(mode, words, some, "", since_sign, since_byte))
    columns = ["while", "who", "onsets", "stall / headroom / none", "before it", "never"]
    for since in ("sign", "byte"):
        columns += [f"{since}: p50 ms", "p99", "worst"]
    title = "Reaction: from the first sign of need, and from the neighbour's first byte"
    return Table(title=title, columns=columns, rows=rows)


def _row(
    mode: str,
    who: str,
    onsets: Sequence[Onset],
    early: str,
    *since: Sequence[float | None],
) -> list[str]:
    signs = [sum(one.signal == what for one in onsets) for what in ("stall", "headroom", "")]
    never = sum(seconds is None and one.needed for one, seconds in zip(onsets, since[-1], strict=True))
    counts = [str(len(onsets)), " / ".join(map(str, signs)), early, str(never)]
    return [mode, who, *counts, *(word for values in since for word in _p(_known(values)))]


def _after(signal_s: float | None, seen_s: float | None) -> float | None:
    """Seconds from a signal to what was seen; 0 where it was before the signal, or there never was one."""
    if seen_s is None:
        return None
    return 0.0 if signal_s is None else max(0.0, seen_s - signal_s)


def jitter_table(onsets: Sequence[Onset]) -> Table:
    """What trims and restores add to the time of a token."""
    rows = []
    for name, words in (
        ("calm", "calm"),
        ("pressed", "beside the neighbour"),
        ("trim", "near a trim"),
        ("restore", "near a restore"),
    ):
        governed = [onset for onset in onsets if onset.variant == "psi"]
        token_s = [seconds for onset in governed for seconds in getattr(onset.near, name)]
        rows.append([words, str(len(token_s)), *_p(token_s)])
    return Table(
        title="Time of a token", columns=["while", "tokens", "p50 ms", "p99 ms", "max ms"], rows=rows
    )


def notes(onsets: Sequence[Onset], asked: LatencyOptions) -> list[str]:
    """How to read it."""
    governed = [onset for onset in onsets if onset.variant == "psi"]
    share = max(onset.watch_share for onset in onsets)
    return [
        "first sign of need: 10 ms of `some` in the pen since the neighbour's first byte, or headroom under "
        "the governor's low line, seen from outside of the pen every 3 ms; whichever came first",
        "before it: the governor trims when headroom falls fast, and bytes were back before there was "
        "a sign, or there never was one. They count as 0 ms from the sign: see the time from the byte",
        f"a poller acts when it reads avg10 at {asked.avg10:.0%} or above, and its own work is not counted; "
        "never: not before the neighbour had gone. Beside the governor avg10 hardly rises, since it was "
        f"relieved: the ungoverned onsets, held for {asked.hold_max_s:g} s, show what a poller has to go by",
        f"on {sum(not onset.needed for onset in onsets)} onsets there was neither a sign nor anything given "
        "back: the load fitted as things stood, and nobody is said to have missed them",
        f"looking at the pen took up to {share:.1%} of one core",
        f"of the governed onsets {sum(onset.killed for onset in governed)} ended in a kill, and "
        f"{sum(not onset.whole for onset in governed)} did not leave every bit of the context back: the "
        "model was started anew",
        "the governor's budget a minute is lifted: it is a guard against just this many onsets",
    ]


def records(onsets: Sequence[Onset]) -> list[dict[str, Any]]:
    """A flat line for each onset."""
    lines = []
    for onset in onsets:
        line = {
            key: value
            for key, value in msgspec.structs.asdict(onset).items()
            if key not in {"near", "poll_s"}
        }
        line.update(
            {f"poll_{poll_s:g}s_s": value for poll_s, value in zip(POLLS_S, onset.poll_s, strict=True)}
        )
        lines.append({**line, "reaction_s": onset.reaction_s})
    return lines


def _modes(onsets: Sequence[Onset]) -> list[str]:
    return list(dict.fromkeys(onset.mode for onset in onsets))


def _p(seconds: Sequence[float]) -> list[str]:
    if not seconds:
        return ["-"] * 3
    return [
        f"{1e3 * value:.0f}" for value in (percentile(seconds, 0.5), percentile(seconds, 0.99), max(seconds))
    ]
