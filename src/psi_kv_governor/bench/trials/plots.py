"""The plots of the trials, as PNG: kills by ramp, capacity by limit, times of reaction."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from psi_kv_governor.bench.messages import Variant
from psi_kv_governor.bench.script import MIB
from psi_kv_governor.bench.trials.capacity_plan import Probe, longest
from psi_kv_governor.bench.trials.keep import Draw
from psi_kv_governor.bench.trials.latency_plan import POLLS_S, Onset
from psi_kv_governor.bench.trials.oom_plan import NAMES, VARIANTS, sorted_rates
from psi_kv_governor.errors import PsiKvError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from psi_kv_governor.bench.trials.oom_report import Cell

# Two of Okabe and Ito's colours, told apart by colour-blind readers too.
COLOURS: dict[Variant, str] = {"fixed": "#9A9A9A", "psi": "#0072B2"}
_POLLERS = ("#E69F00", "#D55E00")
_T = TypeVar("_T")


def drawn(draw: Callable[[Path, Sequence[_T]], None], what: Sequence[_T]) -> Draw:
    """`draw` as `keep.save` wants it: where matplotlib is missing it says so, and nothing is lost."""

    def into(folder: Path) -> list[str]:
        try:
            draw(folder / f"{draw.__name__}.png", what)
        except ModuleNotFoundError as error:
            if error.name != "matplotlib":
                raise
            return ["no plot: matplotlib is missing (pip install 'psi-kv-governor[plot]')"]
        except OSError as error:
            raise PsiKvError(f"cannot write the plot into {folder}: {error.strerror}") from error
        return []

    return into


def _one(path: Path, draw: Callable[[Axes], None], width_in: float = 6.5) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width_in, 3.6), dpi=120, layout="constrained")
    axes = figure.subplots()
    draw(axes)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(frameon=False, fontsize=8, loc="outside upper center", ncols=3)
    figure.savefig(path, format="png")


def kills(path: Path, cells: Sequence[Cell]) -> None:
    """Share of runs with a kill by ramp, with its interval of 95 %."""

    def draw(axes: Axes) -> None:
        rates = sorted_rates([cell.rate for cell in cells])
        for number, variant in enumerate(VARIANTS):
            mine = [cell for cell in cells if cell.variant == variant]
            places = [rates.index(cell.rate) + 0.12 * (2 * number - 1) for cell in mine]
            shares = [100 * cell.killed / cell.runs for cell in mine]
            below = [share - 100 * cell.low for share, cell in zip(shares, mine, strict=True)]
            above = [100 * cell.high - share for share, cell in zip(shares, mine, strict=True)]
            runs = sum(cell.runs for cell in mine)
            axes.errorbar(
                places,
                shares,
                yerr=(below, above),
                fmt="o",
                color=COLOURS[variant],
                capsize=3,
                label=f"{NAMES[variant]}, {runs} runs",
            )
        axes.set_xticks(range(len(rates)), [f"{rate:g}" if rate else "as fast\nas it can" for rate in rates])
        axes.set_xlabel("ramp of the neighbour, MB/s")
        axes.set_ylabel("runs with a kill, %")
        axes.set_ylim(-4, 104)

    _one(path, draw)


def capacity(path: Path, probes: Sequence[Probe]) -> None:
    """The longest context by limit; the governed bar is darker where it is live."""

    def draw(axes: Axes) -> None:
        limits = sorted({probe.limit_bytes for probe in probes})
        named: set[str] = set()

        def once(name: str) -> str | None:
            """A label, the first time that it is asked for."""
            if name in named:
                return None
            named.add(name)
            return name

        for number, variant in enumerate(VARIANTS):
            for place, limit in enumerate(limits):
                best = longest(probes, variant, limit)
                if best is None:
                    continue
                at = place + 0.2 * (2 * number - 1)
                label = once(NAMES[variant])
                axes.bar(at, best.live_cells, width=0.36, color=COLOURS[variant], label=label)
                away = best.length - best.live_cells
                if away:
                    kept = once("governed, away and to come back")
                    axes.bar(
                        at, away, width=0.36, bottom=best.live_cells, color="#56B4E9", alpha=0.6, label=kept
                    )
                speed = best.tokens_per_s
                words = f"{best.length:,}\n{speed:.1f} tok/s" if speed else f"{best.length:,}"
                axes.annotate(
                    words, (at, best.length), (0, 2), textcoords="offset points", ha="center", fontsize=7
                )
        axes.set_xticks(range(len(limits)), [f"{limit // MIB} MiB" for limit in limits])
        axes.set_xlabel("memory limit, no kill and no thrash")
        axes.set_ylabel("tokens of context")
        axes.margins(y=0.18)

    _one(path, draw)


def reactions(path: Path, onsets: Sequence[Onset]) -> None:
    """Which share of the onsets was answered within a time, for the governor and for pollers of avg10."""
    from matplotlib.figure import Figure

    modes = list(dict.fromkeys(onset.mode for onset in onsets))
    figure = Figure(figsize=(3.6 * len(modes) + 0.6, 3.4), dpi=120, layout="constrained")
    for axes, mode in zip(figure.subplots(1, len(modes), sharey=True, squeeze=False)[0], modes, strict=True):
        mine = [onset for onset in onsets if (onset.mode, onset.variant) == (mode, "psi")]
        control = [onset for onset in onsets if (onset.mode, onset.variant) == (mode, "fixed")]
        _steps(axes, [onset.returned_s for onset in mine], COLOURS["psi"], "governor, bytes back")
        for number, poll_s in enumerate(POLLS_S):
            times = [onset.poll_s[number] for onset in control]
            _steps(axes, times, _POLLERS[number], f"poll avg10 every {poll_s:g} s, ungoverned")
        axes.set_title(f"{mode}: {len(mine)} onsets, {len(control)} ungoverned", fontsize=9)
        axes.set_xscale("log")
        axes.set_xlim(1.0, 60_000.0)
        axes.set_xlabel("ms from the neighbour's first byte")
        axes.set_ylim(0, 145)
        axes.set_yticks(range(0, 101, 20))
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=7, loc="upper left")
    figure.axes[0].set_ylabel("onsets answered, %")
    figure.savefig(path, format="png")


def _steps(axes: Axes, reactions_s: Sequence[float | None], colour: str, label: str) -> None:
    """The share answered by time; it ends below 100 % where some never were."""
    if not reactions_s:
        return
    found = sorted(max(1.0, 1e3 * seconds) for seconds in reactions_s if seconds is not None)
    never = len(reactions_s) - len(found)
    words = f"{label}; never: {never}" if never else label
    shares = [100 * (place + 1) / len(reactions_s) for place in range(len(found))]
    axes.step([1.0, *found], [0.0, *shares], where="post", color=colour, label=words)
