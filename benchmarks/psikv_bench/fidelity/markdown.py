"""The report for people: one Markdown file, with the plots beside it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from psikv_bench.fidelity import targets
from psikv_bench.fidelity.intervals import Interval, Share
from psikv_bench.fidelity.likelihood import ONE_CELL
from psikv_bench.fidelity.results import FidelityReport, Likelihood, Retrieval, When
from psi_kv_governor.bench.record import Figure

Row = Sequence[str]


def markdown(report: FidelityReport, plots: Iterable[str] = ()) -> str:
    """The whole report. `plots` are names of files that lie beside it."""
    sections = [
        ["# What is lost when a part of the context is given up", *_heading(report)],
        ["## What is asked", *_targets(report)],
        *([f"![{name}]({name})"] for name in plots),
        ["## Next-token distributions", *_likelihood(report)],
        ["## The same, text by text", *_by_text(report)],
        ["## Each policy as the default", *_as_default(report)],
        ["## In steps and at once", *_gradual(report)],
        [
            "## Hidden facts",
            *_tasks(report),
            *_retrieval(report, "known"),
            *_retrieval(report, "later"),
            *_depths(report),
        ],
        ["## Chats", *_chats(report)],
        ["## A spike of pressure", *_spikes(report)],
    ]
    return (
        "\n\n".join("\n\n".join(section) for section in sections if len(section) > 1 or "![" in section[0])
        + "\n"
    )


def table(head: Row, rows: Iterable[Row]) -> str:
    """A Markdown table; the first column is left-aligned, the others right."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _heading(report: FidelityReport) -> Iterator[str]:
    header, setting = report.header, report.setting
    if report.unfinished:
        yield f"**{report.unfinished[0].upper()}{report.unfinished[1:]}.**"
    yield (
        f"`{header.command}` on {header.model} ({setting.cache} cache), {header.threads[0]} of "
        f"{header.machine.cores} cores of {header.machine.processor}, {header.started_utc}, "
        f"{header.seconds / 60:.0f} minutes."
    )
    for part, later in report.added.items():
        yield (
            f"*{part}* was measured by `{later.command}`, {later.started_utc}, {later.threads[0]} of "
            f"{later.machine.cores} cores, load before {later.load_before:.1f}."
        )
    read = ", ".join(f"{text.name} ({text.about})" for text in setting.texts)
    lengths = ", ".join(f"{length:,}" for length in setting.ctx)
    yield (
        f"Texts: {read}. Context: {lengths} tokens, then {setting.continuation} that follow. "
        f"Protected: the first {setting.sink_cells} and the last {setting.window_cells}. "
        f"Given up in blocks of {setting.block_cells}. `random` under {setting.random_seeds} seeds. "
        "Intervals are 95 %."
    )


def _targets(report: FidelityReport) -> Iterator[str]:
    yield table(("", "asked", "measured", "least to most", ""), map(_target, report.figures))


def _target(found: Figure) -> Row:
    name = f"{found.name} ({found.case})" if found.case else found.name
    spread = f"{targets.told(found.min, found.unit)} to {targets.told(found.max, found.unit)}"
    passed = {True: "met", False: "**missed**", None: ""}[found.passed]
    measured = targets.told(targets.judged(found), found.unit)
    return name, targets.asked_words(found), measured, spread if len(found.values) > 1 else "", passed


# -- distributions -----------------------------------------------------------------------------------------


def _likelihood(report: FidelityReport) -> Iterator[str]:
    over_all = [line for line in report.likelihood if not line.text and not line.ctx]
    if not over_all:
        return
    head = ("policy", "given up", "KL divergence, nats", "top-1 agreement", "perplexity", "over full's")
    yield table(head, map(_line, over_all))
    weights = "in f32" if report.setting.weights == "f32" else "as in the file"
    yield (
        f"Weights {weights}. *{ONE_CELL}* is the control: one cell in the middle of the context is given "
        "up, so what differs is the arithmetic."
    )
    if report.noise is not None:
        noise = report.noise
        yield (
            "With the weights as the file has them, that control alone gives "
            f"{noise.kl.mean:.4f} nats and {noise.top1.mean:.1%} agreement."
        )
    if report.trims_between_exact:
        yield (
            f"After {report.trims_between_exact:,} trims and restores {report.differing_logits:,} logits of "
            "the full cache differ from those before."
        )


def _line(line: Likelihood) -> Row:
    share = f"{line.share:.0%}" if line.share else ""
    return (
        line.policy,
        share,
        nats(line.kl),
        percent(line.top1),
        f"{line.perplexity:.2f}",
        ratio(line.perplexity_ratio),
    )


def nats(value: Interval) -> str:
    """A divergence with its interval."""
    return f"{value.mean:.4f} ({value.low:.4f} to {value.high:.4f})"


def percent(value: Interval | Share) -> str:
    """A share with its interval."""
    return f"{value.mean:.1%} ({value.low:.1%} to {value.high:.1%})"


def ratio(value: Interval) -> str:
    """How many times as much, with its interval."""
    return f"{value.mean:.3f} ({value.low:.3f} to {value.high:.3f})"


def _by_text(report: FidelityReport) -> Iterator[str]:
    for share in report.setting.shares:
        lines = [line for line in report.likelihood if line.text and not line.ctx and line.share == share]
        names = list(dict.fromkeys(line.text for line in lines))
        if not names:
            continue
        found = {(line.policy, line.text): line for line in lines}
        rows = [
            (policy, *(_kl(found.get((policy, name))) for name in names))
            for policy in report.setting.policies
        ]
        yield f"KL divergence in nats, {share:.0%} given up:"
        yield table(("policy", *names), rows)


def _kl(line: Likelihood | None) -> str:
    return f"{line.kl.mean:.4f}" if line else ""


def _as_default(report: FidelityReport) -> Iterator[str]:
    judged = {
        policy: list(targets.likelihood_figures(report.likelihood, policy))
        for policy in report.setting.policies
    }
    head = next((figures for figures in judged.values() if figures), [])
    if head:
        yield "The worst text counts:"
        yield table(
            ("policy", *(f"{figure.name} ({targets.asked_words(figure)})" for figure in head)),
            [(policy, *map(_mark, figures)) for policy, figures in judged.items()],
        )


def _mark(found: Figure) -> str:
    return targets.told(targets.judged(found), found.unit) + (" met" if found.passed else " missed")


def _gradual(report: FidelityReport) -> Iterator[str]:
    if report.gradual:
        share = report.gradual[0].share
        yield (
            f"KL divergence in nats after {share:.0%} was given up, at once or in five steps with tokens "
            "in between:"
        )
        rows = [(line.policy, nats(line.at_once), nats(line.in_steps)) for line in report.gradual]
        yield table(("policy", "at once", "in five steps"), rows)


# -- answers -----------------------------------------------------------------------------------------------


def _tasks(report: FidelityReport) -> Iterator[str]:
    if report.tasks:
        rows = [
            (task.name, task.about, percent(task.full), "asked" if task.able else "beyond this model")
            for task in report.tasks
        ]
        yield table(("task", "what is hidden", "full cache", ""), rows)


def _retrieval(report: FidelityReport, when: When) -> Iterator[str]:
    lines = [line for line in report.retrieval if line.when == when]
    if not lines:
        return
    names = list(dict.fromkeys(line.task for line in lines))
    found = {(line.policy, line.share, line.task): line for line in lines}
    rows = [
        (policy, f"{share:.0%}", *(_share(found.get((policy, share, name))) for name in names))
        for share in report.setting.shares
        for policy in report.setting.policies
    ]
    scene = {"known": "The question was there when cells were given up", "later": "The question came after"}
    yield f"{scene[when]}, share answered right:"
    yield table(("policy", "given up", *names), rows)


def _depths(report: FidelityReport) -> Iterator[str]:
    """Single needles only: the other tasks are too few to be split in three."""
    lines = [line for line in report.retrieval if line.task == "needle"]
    if not lines:
        return
    cases = [(when, third) for when in targets.SCENES for third in lines[0].by_depth]
    found = {(line.policy, line.share, line.when): line.by_depth for line in lines}
    rows = [
        (
            policy,
            f"{share:.0%}",
            *(_of(found.get((policy, share, when), {}).get(third)) for when, third in cases),
        )
        for share in report.setting.shares
        for policy in report.setting.policies
    ]
    yield "Single needles by the third of the text in which they are, answered right:"
    head = (f"{targets.SCENES[when]}: {third}" for when, third in cases)
    yield table(("policy", "given up", *head), rows)


def _of(share: Share | None) -> str:
    return f"{share.right} of {share.trials}" if share else ""


def _share(line: Retrieval | None) -> str:
    return percent(line.all) if line else ""


def _chats(report: FidelityReport) -> Iterator[str]:
    if report.conversation:
        rows = [
            (line.policy, f"{line.given_up:.0%}", f"{line.trims:.1f}", percent(line.right))
            for line in report.conversation
        ]
        yield "Facts told early, chatter after, questions at the end; the governor gave cells up in between:"
        yield table(("policy", "away at the end", "trims", "right"), rows)


def _spikes(report: FidelityReport) -> Iterator[str]:
    if report.spikes:
        rows = [
            (
                spike.policy,
                f"{spike.share:.0%}",
                f"{spike.same_under_pressure} of {spike.tokens}",
                f"{spike.same_after_restore} of {spike.tokens}",
                f"{spike.differing_logits:,}",
            )
            for spike in report.spikes
        ]
        yield "Tokens of a greedy answer that are as if nothing had ever been given up:"
        head = ("policy", "given up", "under pressure", "after restoring", "logits that differ then")
        yield table(head, rows)
    if report.speed is not None:
        ratio = next(targets.speed_figures(report.speed))
        yield (
            f"A token takes {ratio.median:.2f} times as long after half of {report.speed.ctx:,} was given up "
            f"({ratio.min:.2f} to {ratio.max:.2f}, {len(ratio.values)} turns with {report.speed.policy})."
        )
