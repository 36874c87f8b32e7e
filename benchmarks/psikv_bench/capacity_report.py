"""What the probes of the capacity scene come to."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec

from psi_kv_governor.sandbox.load import MIB
from psikv_bench import plots
from psikv_bench.figures import Asked, Figure, figure
from psikv_bench.messages import Token, Variant
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
    prompt_tokens_per_s: float | None
    tokens_per_s: float | None
    """Decoding at the end, by the median token."""
    peak_bytes: int
    """Most ever charged to the cgroup; 0 where the kernel does not keep it."""
    live_cells: int
    masked_cells: int
    """Away, and to come back bit for bit."""
    lost_cells: int
    """Away, and to be decoded again."""

    @property
    def survived(self) -> bool:
        """Nobody was killed, and nothing came too slowly."""
        return self.ending == "survived"

    @property
    def live_share(self) -> float:
        """Of the context that the last token attended to."""
        return self.live_cells / self.length if self.survived else 0.0


def too_slow(decoded: Sequence[Token], silent_s: float, tokens: int, chunk: int, least_per_s: float) -> bool:
    """Whether the last chunk of the prompt, or all of the tokens that come one by one, take too long.

    `decoded` has at least one. What is waited for counts as well, by the `silent_s` that it has taken so
    far. Single tokens are judged by their sum: the first one after a prompt is slower than the others.
    """
    singles_s = [token.seconds for token in decoded if token.tokens == 1]
    if singles_s:
        return max(sum(singles_s), silent_s) > tokens / least_per_s
    last = decoded[-1]
    return last.seconds > last.tokens / least_per_s or silent_s > chunk / least_per_s


Best = dict[tuple[int, Variant], Probe | None]


def longest(probes: Sequence[Probe]) -> Best:
    """The longest that survived, by limit and variant; None where none did."""
    found: Best = {}
    for limit in sorted({probe.limit_bytes for probe in probes}):
        for variant in in_order(list({probe.variant for probe in probes})):
            mine = [probe for probe in probes if (probe.limit_bytes, probe.variant) == (limit, variant)]
            alive = [probe for probe in mine if probe.survived]
            found[limit, variant] = max(alive, key=lambda probe: probe.length, default=None)
    return found


def figures(probes: Sequence[Probe], asked: Asked | None = CLAIMED) -> Iterator[Figure]:
    """The gain at each limit, beside what is claimed for the method."""
    best = longest(probes)
    for (limit, variant), other in best.items():
        fixed = best.get((limit, "fixed"))
        if variant == "fixed" or fixed is None or other is None:
            continue
        case = f"{variant}, {limit // MIB} MiB"
        yield figure("context over fixed", "x", [other.length / fixed.length], asked, case=case)
        yield figure("of it live at the end", "share", [other.live_share], case=case)
        if fixed.tokens_per_s and other.tokens_per_s:
            ratio = other.tokens_per_s / fixed.tokens_per_s
            yield figure("tokens per second over fixed", "x", [ratio], case=case)


def _rate(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


_BEST: dict[str, Callable[[Probe], str]] = {
    "longest": lambda probe: f"{probe.length:,}",
    "live": lambda probe: f"{probe.live_share:.0%}",
    "masked": lambda probe: f"{probe.masked_cells:,}",
    "lost": lambda probe: f"{probe.lost_cells:,}",
    "prompt tok/s": lambda probe: _rate(probe.prompt_tokens_per_s),
    "tok/s": lambda probe: _rate(probe.tokens_per_s),
    "peak MiB": lambda probe: f"{probe.peak_bytes / MIB:.0f}",
}


def best_table(probes: Sequence[Probe]) -> Table:
    """The longest that survived."""
    rows = [
        [f"{limit // MIB}", variant, *(say(best) if best else "none" for say in _BEST.values())]
        for (limit, variant), best in longest(probes).items()
    ]
    return Table(
        title="The longest context that survives", columns=["limit MiB", "variant", *_BEST], rows=rows
    )


def notes(chunk: int, tokens: int, least_tokens_s: float) -> list[str]:
    """How to read it."""
    return [
        f"survived: the kernel killed nobody, and neither a chunk of {chunk} tokens of the prompt nor the "
        f"{tokens} tokens after it came slower than {least_tokens_s:.3g} a second: slower, it reads its "
        "weights again for every token",
        "fixed: plain llama_cpp.Llama with n_ctx of just that length, every token attended to",
        "governed: positions that are away are known and come back when memory is free, but a token decoded "
        "now attends to the live ones alone: the share is in the table. The floor keeps a fifth live, so no "
        "more than 5 times what fits is possible with the default settings",
    ]


def plot(folder: Path, probes: Sequence[Probe]) -> str:
    """The longest context by limit; a column is paler where it is away and comes back."""
    best = longest(probes)
    limits = list(dict.fromkeys(limit for limit, _ in best))
    variants = list(dict.fromkeys(variant for _, variant in best))
    width = 0.8 / len(variants)

    def draw(figure: Any, grid: Any) -> None:
        axes = grid[0, 0]
        for (limit, variant), probe in best.items():
            if probe is None:
                continue
            at = limits.index(limit) + width * (variants.index(variant) - (len(variants) - 1) / 2)
            style = {"width": 0.9 * width, "color": plots.COLOURS[variant]}
            axes.bar(at, probe.live_cells, label=variant, **style)
            if away := probe.length - probe.live_cells:
                label = f"{variant}, away and to come back"
                axes.bar(at, away, bottom=probe.live_cells, alpha=0.4, label=label, **style)
            words = f"{probe.length:,}\n{_rate(probe.tokens_per_s)} tok/s"
            plots.annotate(axes, words, (at, probe.length))
        axes.set_xticks(range(len(limits)), [f"{limit // MIB} MiB" for limit in limits])
        axes.set_xlabel("memory limit, no kill and no thrash")
        axes.set_ylabel("tokens of context")
        axes.margins(y=0.18)
        plots.legend_above(figure)

    return plots.saved(folder / "capacity.png", draw, size_in=(6.5, 3.6))
