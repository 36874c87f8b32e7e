"""What was found, as tables with a line for each policy and share."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from psikv_bench.fidelity.likelihood import ONE_CELL
from psikv_bench.fidelity.results import SCENES, Answers, Likelihood, Rows, Spike
from psikv_bench.fidelity.retrieval import ABLE, able
from psikv_bench.fidelity.tasks import ABOUT
from psikv_bench.fidelity.texts import TEXTS
from psikv_bench.intervals import Interval, Share
from psikv_bench.record import Table

Line = Likelihood | Answers | Spike


def tables(rows: Rows) -> list[Table]:
    """All for which something was measured."""
    over_all = ((line, _distributions(line)) for line in rows.likelihood if not line.text)
    by_text = ((line, {line.text: f"{line.kl.mean:.4f}"}) for line in rows.likelihood if line.text)
    answers = (
        (line, {f"{line.task}, {SCENES[line.when]}": _shown(line.right, ".1%")}) for line in rows.answers
    )
    found = [
        _table("Next-token distributions", over_all),
        _table("KL divergence in nats by text", by_text),
        _table("Share answered right", answers),
        _table(
            "Tokens of a greedy answer that are as if nothing was ever given up",
            ((line, _spike(line)) for line in rows.spikes),
        ),
    ]
    return [table for table in found if table.rows]


def _table(title: str, cells: Iterable[tuple[Line, dict[str, str]]]) -> Table:
    """Cells by the names of their columns; those of one policy and share stand in one line."""
    found: dict[tuple[str, str], dict[str, str]] = {}
    for line, named in cells:
        given_up = f"{line.share:.0%}" if line.share else ""
        found.setdefault((line.policy, given_up), {}).update(named)
    columns = list(dict.fromkeys(name for named in found.values() for name in named))
    rows = [[*case, *(named.get(name, "") for name in columns)] for case, named in found.items()]
    return Table(title=title, columns=["policy", "given up", *columns], rows=rows)


def _shown(value: Interval | Share, form: str) -> str:
    return f"{value.mean:{form}} ({value.low:{form}} to {value.high:{form}})"


def _distributions(line: Likelihood) -> dict[str, str]:
    return {
        "KL divergence, nats": _shown(line.kl, ".4f"),
        "top-1 agreement": _shown(line.top1, ".1%"),
        "perplexity": f"{line.perplexity:.2f}",
        "over full's": _shown(line.perplexity_ratio, ".3f"),
    }


def _spike(spike: Spike) -> dict[str, str]:
    return {
        "under pressure": f"{spike.same_under_pressure} of {spike.tokens}",
        "after restoring": f"{spike.same_after_restore} of {spike.tokens}",
        "logits that differ then": f"{spike.differing_logits:,}",
    }


def notes(rows: Rows) -> Iterator[str]:
    """How to read them."""
    plan = rows.plan
    read = ", ".join(f"{name} ({TEXTS[name].about})" for name in plan.texts)
    lengths = ", ".join(f"{length:,}" for length in plan.ctx)
    yield (
        f"texts: {read}; context: {lengths} tokens ({plan.cache}), then {plan.continuation} that follow; "
        f"protected: the first {plan.sink_cells} and the last {plan.window_cells}; given up in blocks of "
        f"{plan.block_cells}; `random` under {plan.random_seeds} seeds; intervals are 95 %"
    )
    weights = "in f32" if plan.weights == "f32" else "as in the file"
    yield (
        f"distributions: weights {weights}; *{ONE_CELL}* is the control: one cell in the middle of the "
        "context is given up, so what differs is the arithmetic"
    )
    asked = [task for task in ABOUT if any(line.task == task for line in rows.answers)]
    if asked:
        yield "hidden facts: " + "; ".join(f"*{task}*: {ABOUT[task]}" for task in asked)
    if beyond := [task for task in asked if task not in able(rows.answers)]:
        yield (
            f"beyond this model, and not asked of a trimmed cache: {', '.join(beyond)} (of the full cache at "
            f"least {ABLE:.0%} right is asked)"
        )
