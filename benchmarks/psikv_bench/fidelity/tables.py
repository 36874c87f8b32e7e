"""What was found, as tables."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from psikv_bench.fidelity import targets
from psikv_bench.fidelity.likelihood import ONE_CELL
from psikv_bench.fidelity.results import Likelihood, Rows, When
from psikv_bench.figures import Figure, measured
from psikv_bench.intervals import Interval, Share
from psikv_bench.record import Table


def tables(rows: Rows) -> list[Table]:
    """All for which something was measured."""
    found = [
        _policies(rows),
        _likelihood(rows),
        *(_by_text(rows, share) for share in rows.setting.shares),
        _as_default(rows),
        _gradual(rows),
        _tasks(rows),
        *(_retrieval(rows, when) for when in targets.SCENES),
        _depths(rows),
        _chats(rows),
        _spikes(rows),
    ]
    return [table for table in found if table.rows]


def notes(rows: Rows) -> Iterator[str]:
    """How to read them."""
    setting = rows.setting
    for part, later in rows.added.items():
        yield f"*{part}* was measured later: {later.words}"
    read = ", ".join(f"{text.name} ({text.about})" for text in setting.texts)
    lengths = ", ".join(f"{length:,}" for length in setting.ctx)
    yield (
        f"texts: {read}; context: {lengths} tokens ({setting.cache}), then {setting.continuation} that "
        f"follow; protected: the first {setting.sink_cells} and the last {setting.window_cells}; given up in "
        f"blocks of {setting.block_cells}; `random` under {setting.random_seeds} seeds; intervals are 95 %"
    )
    weights = "in f32" if setting.weights == "f32" else "as in the file"
    yield (
        f"distributions: weights {weights}; *{ONE_CELL}* is the control: one cell in the middle of the "
        "context is given up, so what differs is the arithmetic"
    )
    if rows.noise is not None:
        yield (
            "with the weights as the file has them, that control alone gives "
            f"{rows.noise.kl.mean:.4f} nats and {rows.noise.top1.mean:.1%} agreement"
        )
    if rows.trims_between_exact:
        yield (
            f"after {rows.trims_between_exact:,} trims and restores {rows.differing_logits:,} logits of the "
            "full cache differ from those before"
        )


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    return Table(title=title, columns=list(columns), rows=[list(row) for row in rows])


def _over_all(rows: Rows) -> list[Likelihood]:
    return [line for line in rows.likelihood if not line.text and not line.ctx]


def _policies(rows: Rows) -> Table:
    """One line a policy and share: what the plots show."""
    tasks = [task.name for task in rows.tasks if task.able]
    known = {
        (line.policy, line.share, line.task): line.all for line in rows.retrieval if line.when == "known"
    }
    full = {task.name: task.full for task in rows.tasks}
    chats = {(line.policy, line.share): line.right for line in rows.conversation}
    lines = []
    for line in _over_all(rows):
        case = (line.policy, line.share)
        right = [full[name] if line.policy == "full" else known.get((*case, name)) for name in tasks]
        lines.append(
            [
                line.policy,
                _given_up(line.share),
                f"{line.kl.mean:.4f}",
                f"{line.top1.mean:.1%}",
                f"{line.perplexity:.2f}",
                *(f"{share.mean:.0%}" if share else "" for share in (*right, chats.get(case))),
            ]
        )
    columns = ["policy", "given up", "KL, nats", "top-1", "perplexity", *tasks, "chat"]
    return _table("Policy by policy", columns, lines)


def _given_up(share: float) -> str:
    return f"{share:.0%}" if share else ""


# -- distributions -----------------------------------------------------------------------------------------


def _likelihood(rows: Rows) -> Table:
    lines = [
        [
            line.policy,
            _given_up(line.share),
            _interval(line.kl, ".4f"),
            _interval(line.top1, ".1%"),
            f"{line.perplexity:.2f}",
            _interval(line.perplexity_ratio, ".3f"),
        ]
        for line in _over_all(rows)
    ]
    columns = ["policy", "given up", "KL divergence, nats", "top-1 agreement", "perplexity", "over full's"]
    return _table("Next-token distributions", columns, lines)


def _interval(value: Interval | Share, form: str) -> str:
    return f"{value.mean:{form}} ({value.low:{form}} to {value.high:{form}})"


def _by_text(rows: Rows, share: float) -> Table:
    lines = [line for line in rows.likelihood if line.text and not line.ctx and line.share == share]
    names = list(dict.fromkeys(line.text for line in lines))
    found = {(line.policy, line.text): f"{line.kl.mean:.4f}" for line in lines}
    return _table(
        f"KL divergence in nats by text, {share:.0%} given up",
        ["policy", *names],
        [[policy, *(found.get((policy, name), "") for name in names)] for policy in rows.setting.policies]
        if names
        else [],
    )


def _as_default(rows: Rows) -> Table:
    judged = {
        policy: list(targets.likelihood_figures(rows.likelihood, policy)) for policy in rows.setting.policies
    }
    head = next((figures for figures in judged.values() if figures), [])
    return _table(
        "Each policy as the default (the worst text counts)",
        ["policy", *(f"{found.name} ({found.asked_words})" for found in head)],
        [[policy, *map(_mark, figures)] for policy, figures in judged.items()] if head else [],
    )


def _mark(found: Figure) -> str:
    return measured(found.judged, found.unit) + (" met" if found.passed else " missed")


def _gradual(rows: Rows) -> Table:
    lines = [
        [line.policy, _interval(line.at_once, ".4f"), _interval(line.in_steps, ".4f")]
        for line in rows.gradual
    ]
    title = "KL divergence in nats, given up at once or in five steps with tokens in between"
    return _table(title, ["policy", "at once", "in five steps"], lines)


# -- answers -----------------------------------------------------------------------------------------------


def _tasks(rows: Rows) -> Table:
    lines = [
        [task.name, task.about, _interval(task.full, ".1%"), "asked" if task.able else "beyond this model"]
        for task in rows.tasks
    ]
    return _table("Hidden facts", ["task", "what is hidden", "full cache", ""], lines)


def _cases(rows: Rows) -> list[tuple[str, float]]:
    return [(policy, share) for share in rows.setting.shares for policy in rows.setting.policies]


def _retrieval(rows: Rows, when: When) -> Table:
    lines = [line for line in rows.retrieval if line.when == when]
    names = list(dict.fromkeys(line.task for line in lines))
    found = {(line.policy, line.share, line.task): _interval(line.all, ".1%") for line in lines}
    cells = [
        [policy, _given_up(share), *(found.get((policy, share, name), "") for name in names)]
        for policy, share in (_cases(rows) if names else [])
    ]
    title = f"Share answered right, {targets.SCENES[when]}"
    return _table(title, ["policy", "given up", *names], cells)


def _depths(rows: Rows) -> Table:
    """Single needles only: the other tasks are too few to be split in three."""
    lines = [line for line in rows.retrieval if line.task == "needle"]
    cases = [(when, third) for when in targets.SCENES for third in (lines[0].by_depth if lines else ())]
    found = {(line.policy, line.share, line.when): line.by_depth for line in lines}
    cells = [
        [
            policy,
            _given_up(share),
            *(_of(found.get((policy, share, when), {}).get(third)) for when, third in cases),
        ]
        for policy, share in (_cases(rows) if cases else [])
    ]
    head = (f"{targets.SCENES[when]}: {third}" for when, third in cases)
    title = "Single needles by the third of the text in which they are, answered right"
    return _table(title, ["policy", "given up", *head], cells)


def _of(share: Share | None) -> str:
    return f"{share.hits} of {share.trials}" if share else ""


def _chats(rows: Rows) -> Table:
    lines = [
        [line.policy, f"{line.given_up:.0%}", f"{line.trims:.1f}", _interval(line.right, ".1%")]
        for line in rows.conversation
    ]
    title = "Chats: facts said early, chatter after, questions at the end; the governor gave up in between"
    return _table(title, ["policy", "away at the end", "trims", "right"], lines)


def _spikes(rows: Rows) -> Table:
    lines = [
        [
            spike.policy,
            _given_up(spike.share),
            f"{spike.same_under_pressure} of {spike.tokens}",
            f"{spike.same_after_restore} of {spike.tokens}",
            f"{spike.differing_logits:,}",
        ]
        for spike in rows.spikes
    ]
    columns = ["policy", "given up", "under pressure", "after restoring", "logits that differ then"]
    return _table("Tokens of a greedy answer that are as if nothing was ever given up", columns, lines)
