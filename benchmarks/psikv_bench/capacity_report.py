"""What the probes of the capacity scene come to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec

from psi_kv_governor.quantile import quantile
from psi_kv_governor.sandbox.host import MIB
from psi_kv_governor.sandbox.messages import Variant
from psikv_bench import plots
from psikv_bench.figures import Asked, Figure, figure, ms
from psikv_bench.options import in_order
from psikv_bench.record import Table

CLAIMED = Asked(">=", 4.0)

Ending = Literal["survived", "killed", "slow", "failed"]
"""`slow`: a chunk of the prompt, or the decoding, came at less than the asked rate: it thrashes. `failed`:
the process could not even open such a context."""


class Probe(msgspec.Struct, frozen=True, kw_only=True):
    """One context of one length in a cgroup of its own."""

    variant: Variant
    limit_bytes: int
    length: int
    ending: Ending
    why: str
    """Where it did not survive."""
    done_tokens: int
    """Of the length: how far it came."""
    prefill_tokens_per_s: float | None
    token_s: list[float]
    """Of each token that was decoded at the end."""
    peak_bytes: int
    """Most ever charged to the cgroup; 0 where the kernel does not keep it."""
    live_cells: int
    masked_cells: int
    """Away, and to come back bit for bit."""
    lost_cells: int
    """Away, and to be decoded again."""
    returned_bytes: int
    trims: int
    last_turn: str
    """The governor's last reason, where it did not survive."""

    @property
    def tokens_per_s(self) -> float | None:
        """Decoding at the end, by the median token."""
        return 1.0 / quantile(self.token_s, 0.5) if self.token_s else None

    @property
    def live_share(self) -> float:
        """Of the context that the last token attended to."""
        return self.live_cells / self.length if self.ending == "survived" else 0.0


def longest(probes: Sequence[Probe], variant: Variant, limit_bytes: int) -> Probe | None:
    """The longest that survived; None where none did."""
    what = (variant, limit_bytes, "survived")
    mine = [probe for probe in probes if (probe.variant, probe.limit_bytes, probe.ending) == what]
    return max(mine, key=lambda probe: probe.length, default=None)


def _limits(probes: Sequence[Probe]) -> list[int]:
    return sorted({probe.limit_bytes for probe in probes})


def _variants(probes: Sequence[Probe]) -> list[Variant]:
    return in_order(list({probe.variant for probe in probes}))


def figures(probes: Sequence[Probe], asked: Asked | None = CLAIMED) -> Iterator[Figure]:
    """The gain at each limit, beside what is claimed for the method."""
    for limit in _limits(probes):
        fixed = longest(probes, "fixed", limit)
        for variant in _variants(probes):
            other = longest(probes, variant, limit)
            if variant == "fixed" or fixed is None or other is None:
                continue
            case = f"{variant}, {limit // MIB} MiB"
            yield figure("context over fixed", "x", [other.length / fixed.length], asked, case=case)
            yield figure("of it live at the end", "share", [other.live_share], case=case)
            if fixed.tokens_per_s and other.tokens_per_s:
                ratio = other.tokens_per_s / fixed.tokens_per_s
                yield figure("tokens per second over fixed", "x", [ratio], case=case)


def best_table(probes: Sequence[Probe]) -> Table:
    """The longest that survived."""
    rows = []
    for limit in _limits(probes):
        for variant in _variants(probes):
            best = longest(probes, variant, limit)
            row = ["none", *["-"] * 7]
            if best is not None:
                row = [
                    f"{best.length:,}",
                    f"{best.live_share:.0%}",
                    f"{best.masked_cells:,}",
                    f"{best.lost_cells:,}",
                    _rate(best.prefill_tokens_per_s),
                    _rate(best.tokens_per_s),
                    ms(quantile(best.token_s, 0.99)),
                    f"{best.peak_bytes / MIB:.0f}",
                ]
            rows.append([f"{limit // MIB}", variant, *row])
    columns = ["limit MiB", "variant", "longest", "live", "masked", "lost", "prompt tok/s", "tok/s", "p99 ms"]
    return Table(title="The longest context that survives", columns=[*columns, "peak MiB"], rows=rows)


def probes_table(probes: Sequence[Probe]) -> Table:
    """Every probe in its order."""
    rows = [
        [
            f"{probe.limit_bytes // MIB}",
            probe.variant,
            f"{probe.length:,}",
            probe.ending,
            f"{probe.done_tokens:,}",
            f"{probe.live_cells:,}",
            _rate(probe.tokens_per_s),
            " ".join(filter(None, (probe.why, probe.last_turn))),
        ]
        for probe in probes
    ]
    columns = ["limit MiB", "variant", "tokens", "ending", "came to", "live cells", "tok/s", "why"]
    return Table(title="Probes", columns=columns, rows=rows)


def notes(chunk: int, tokens: int, least_tokens_s: float) -> list[str]:
    """How to read it."""
    return [
        f"survived: the prompt was decoded in chunks of {chunk}, and {tokens} tokens after it; "
        f"the kernel killed nobody, and neither a chunk nor the decoding was slower than "
        f"{least_tokens_s:.3g} tokens per second (left out: a tenth of what the model does with a "
        "short context and memory to spare): slower, it reads its weights again for every token",
        "fixed: plain llama_cpp.Llama with n_ctx of just that length, every token attended to",
        "governed: positions that are away are known and come back when memory is free, but a token decoded "
        "now attends to the live ones alone: the share is in the table. The floor keeps a fifth live, so no "
        "more than 5 times what fits is possible with the default settings",
    ]


def records(probes: Sequence[Probe]) -> list[dict[str, Any]]:
    """A flat line for each probe."""
    lines = []
    for probe in probes:
        line = msgspec.structs.asdict(probe)
        del line["token_s"]
        lines.append({**line, "tokens_per_s": probe.tokens_per_s, "live_share": probe.live_share})
    return lines


def _rate(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def plot(folder: Path, probes: Sequence[Probe]) -> str:
    """The longest context by limit; a column is paler where it is away and comes back."""
    limits, variants = _limits(probes), _variants(probes)

    def draw(figure: Any, grid: Any) -> None:
        axes = grid[0, 0]
        width = 0.8 / len(variants)
        for number, variant in enumerate(variants):
            for place, limit in enumerate(limits):
                best = longest(probes, variant, limit)
                if best is None:
                    continue
                at = place + width * (number - (len(variants) - 1) / 2)
                style = {"width": 0.9 * width, "color": plots.COLOURS[variant]}
                axes.bar(at, best.live_cells, label=variant, **style)
                if away := best.length - best.live_cells:
                    label = f"{variant}, away and to come back"
                    axes.bar(at, away, bottom=best.live_cells, alpha=0.4, label=label, **style)
                speed = f"\n{best.tokens_per_s:.1f} tok/s" if best.tokens_per_s else ""
                plots.annotate(axes, f"{best.length:,}{speed}", (at, best.length))
        axes.set_xticks(range(len(limits)), [f"{limit // MIB} MiB" for limit in limits])
        axes.set_xlabel("memory limit, no kill and no thrash")
        axes.set_ylabel("tokens of context")
        axes.margins(y=0.18)
        plots.legend_above(figure)

    return plots.saved(folder / "capacity.png", draw, size_in=(6.5, 3.6))
