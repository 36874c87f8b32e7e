"""What the onsets of the latency scene come to: times of reaction, and what they cost tokens."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec

from psi_kv_governor.quantile import quantile
from psi_kv_governor.sandbox.llm import is_governed
from psi_kv_governor.sandbox.messages import Variant
from psikv_bench import plots
from psikv_bench.figures import Asked, Figure, figure, ms
from psikv_bench.record import Table
from psikv_bench.trials.series import Near

P50_DECODE = Asked("<=", 150)
P99_DECODE = Asked("<=", 400)
POLLS_S = (1.0, 2.0)
_POLLERS = (plots.ORANGE, plots.RED)
_NEAR = {
    "calm": "calm",
    "pressed": "beside the neighbour",
    "trim": "near a trim",
    "restore": "near a restore",
}


class Reaction(msgspec.Struct, frozen=True, kw_only=True):
    """One time that a neighbour came. Times count from its first byte, unless they say otherwise."""

    number: int
    mode: str
    variant: Variant
    killed: bool
    """The model or the neighbour."""
    signal: str
    """What came first: `stall`, `headroom`, or nothing within the hold (empty)."""
    signal_s: float | None
    returned_s: float | None
    """To the end of the first trim or release that gave bytes back; None: not within the hold."""
    fell_s: float | None
    """To the first fall of the process's anonymous memory, seen from outside; None also with swap, which
    makes it fall as well."""
    poll_s: list[float | None]
    """To when a poller of avg10 would have seen its threshold, for each of POLLS_S."""
    hold_s: float
    """How long there was something to see."""
    returned_bytes: int
    trims: int
    reason: str
    """Of the first trim."""
    restore_s: float | None
    """The restore itself, after the neighbour had gone, while tokens were decoded."""
    whole: bool
    near: Near
    watch_share: float
    """Of one core, that looking at the cgroup took."""

    @property
    def needed(self) -> bool:
        """Whether there was anything to answer: a sign, or a governor that was earlier."""
        return self.signal_s is not None or self.returned_s is not None

    @property
    def before_sign(self) -> bool:
        """Whether bytes were back before there was a sign, or so early that there never was one."""
        if self.returned_s is None:
            return False
        return self.signal_s is None or self.returned_s <= self.signal_s

    @property
    def reaction_s(self) -> float | None:
        """From the signal to the bytes back; 0 where they were back before it. None: nothing came back."""
        return self.after_signal(self.returned_s)

    def after_signal(self, seen_s: float | None) -> float | None:
        """From the signal to what was seen; 0 where it was before it, or there never was one."""
        if seen_s is None:
            return None
        return 0.0 if self.signal_s is None else max(0.0, seen_s - self.signal_s)

    def polled_reaction_s(self, number: int) -> float | None:
        """From the signal to what polling at POLLS_S[number] would have noticed, its own work not counted."""
        polled = self.poll_s[number]
        return None if self.signal_s is None or polled is None else polled - self.signal_s


def of(found: Sequence[Reaction], mode: str, *, governed: bool) -> list[Reaction]:
    """Those of one mode, governed or not."""
    return [one for one in found if one.mode == mode and is_governed(one.variant) is governed]


def _known(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def figures(found: Sequence[Reaction]) -> Iterator[Figure]:
    """Reaction in each mode, beside what is asked while tokens are decoded."""
    for mode in _modes(found):
        mine = of(found, mode, governed=True)
        values = [1e3 * seconds for seconds in _known(one.reaction_s for one in mine)]
        if not values:
            continue
        asked = mode == "decode"
        yield figure("bytes back, p50", "ms", values, P50_DECODE if asked else None, case=mode)
        p99 = quantile(values, 0.99)
        yield figure("bytes back, p99", "ms", [p99], P99_DECODE if asked else None, case=mode)
        yield figure("bytes back, worst", "ms", [max(values)], case=mode)
        since_byte = [1e3 * seconds for seconds in _known(one.returned_s for one in mine)]
        yield figure("the same from the neighbour's first byte, p50", "ms", since_byte, case=mode)
        yield figure("and p99", "ms", [quantile(since_byte, 0.99)], case=mode)


def tables(found: Sequence[Reaction]) -> list[Table]:
    """The governor's reaction and the pollers', and the times of tokens."""
    columns = ["while", "who", "onsets", "stall / headroom / none", "before it", "never"]
    for since in ("sign", "byte"):
        columns += [f"{since}: p50 ms", "p99", "worst"]
    title = "Reaction: from the first sign of need, and from the neighbour's first byte"
    near = []
    for name, words in _NEAR.items():
        governed = [one for one in found if is_governed(one.variant)]
        token_s = [seconds for one in governed for seconds in getattr(one.near, name)]
        near.append([words, str(len(token_s)), *_p(token_s)])
    return [
        Table(title=title, columns=columns, rows=list(_rows(found))),
        Table(title="Time of a token", columns=["while", "tokens", "p50 ms", "p99 ms", "max ms"], rows=near),
    ]


def _rows(found: Sequence[Reaction]) -> Iterator[list[str]]:
    for mode in _modes(found):
        mine, control = (of(found, mode, governed=governed) for governed in (True, False))
        if mine:
            early = str(sum(one.before_sign for one in mine))
            since_sign, since_byte = [one.reaction_s for one in mine], [one.returned_s for one in mine]
            yield _row(mode, "governor, bytes back", mine, early, since_sign, since_byte)
            fell = [one.fell_s for one in mine]
            since_sign = [one.after_signal(one.fell_s) for one in mine]
            yield _row(mode, "governor, first byte back", mine, "", since_sign, fell)
        for who, some in (("governed", mine), ("ungoverned", control)):
            for number, poll_s in enumerate(POLLS_S) if some else ():
                since_sign = [one.polled_reaction_s(number) for one in some]
                since_byte = [one.poll_s[number] for one in some]
                words = f"poll avg10 every {poll_s:g} s, {who}"
                yield _row(mode, words, some, "", since_sign, since_byte)


def _row(
    mode: str, who: str, found: Sequence[Reaction], early: str, *since: Sequence[float | None]
) -> list[str]:
    signs = [sum(one.signal == what for one in found) for what in ("stall", "headroom", "")]
    never = sum(seconds is None and one.needed for one, seconds in zip(found, since[-1], strict=True))
    counts = [str(len(found)), " / ".join(map(str, signs)), early, str(never)]
    return [mode, who, *counts, *(word for values in since for word in _p(_known(values)))]


def _p(seconds: Sequence[float]) -> list[str]:
    if not seconds:
        return ["-"] * 3
    return [ms(quantile(seconds, 0.5)), ms(quantile(seconds, 0.99)), ms(max(seconds))]


def notes(found: Sequence[Reaction], avg10: float, hold_max_s: float) -> list[str]:
    """How to read it."""
    governed = [one for one in found if is_governed(one.variant)]
    return [
        "first sign of need: 10 ms of `some` in the cgroup since the neighbour's first byte, or headroom "
        "under the governor's low line, seen from outside every 3 ms; whichever came first",
        "before it: the governor trims when headroom falls fast, and bytes were back before there was "
        "a sign, or there never was one. They count as 0 ms from the sign: see the time from the byte",
        f"a poller acts when it reads avg10 at {avg10:.0%} or above, and its own work is not counted; "
        "never: not before the neighbour had gone. Beside the governor avg10 hardly rises, since it was "
        f"relieved: the ungoverned onsets, held for {hold_max_s:g} s, show what a poller has to go by",
        f"on {sum(not one.needed for one in found)} onsets there was neither a sign nor anything given "
        "back: the load fitted as things stood, and nobody is said to have missed them",
        f"looking at the cgroup took up to {max(one.watch_share for one in found):.1%} of one core",
        f"of the governed onsets {sum(one.killed for one in governed)} ended in a kill, and "
        f"{sum(not one.whole for one in governed)} did not leave every bit of the context back: the "
        "model was started anew",
        "the governor's budget a minute is lifted: it is a guard against just this many onsets",
    ]


def records(found: Sequence[Reaction]) -> list[dict[str, Any]]:
    """A flat line for each onset."""
    lines = []
    for one in found:
        line = msgspec.structs.asdict(one)
        del line["near"], line["poll_s"]
        polled = {f"poll_{s:g}s_s": value for s, value in zip(POLLS_S, one.poll_s, strict=True)}
        lines.append({**line, **polled, "reaction_s": one.reaction_s})
    return lines


def _modes(found: Sequence[Reaction]) -> list[str]:
    return list(dict.fromkeys(one.mode for one in found))


def plot(folder: Path, found: Sequence[Reaction]) -> str:
    """Which share of the onsets was answered within a time, for the governor and for pollers of avg10."""
    modes = _modes(found)

    def draw(_figure: Any, grid: Any) -> None:
        for axes, mode in zip(grid[0], modes, strict=True):
            mine, control = (of(found, mode, governed=governed) for governed in (True, False))
            _steps(axes, [one.returned_s for one in mine], plots.BLUE, "governor, bytes back")
            for number, poll_s in enumerate(POLLS_S):
                times = [one.poll_s[number] for one in control]
                _steps(axes, times, _POLLERS[number], f"poll avg10 every {poll_s:g} s, ungoverned")
            axes.set_title(f"{mode}: {len(mine)} onsets, {len(control)} ungoverned", fontsize=9)
            axes.set_xscale("log")
            axes.set_xlim(1.0, 60_000.0)
            axes.set_xlabel("ms from the neighbour's first byte")
            axes.set_ylim(0, 145)
            axes.set_yticks(range(0, 101, 20))
            axes.legend(frameon=False, fontsize=7, loc="upper left")
        grid[0, 0].set_ylabel("onsets answered, %")

    size_in = (3.6 * len(modes) + 0.6, 3.4)
    return plots.saved(folder / "reactions.png", draw, size_in=size_in, grid=(1, len(modes)), sharey=True)


def _steps(axes: Any, reactions_s: Sequence[float | None], colour: str, label: str) -> None:
    """The share answered by time; it ends below 100 % where some never were."""
    if not reactions_s:
        return
    found = sorted(max(1.0, 1e3 * seconds) for seconds in reactions_s if seconds is not None)
    never = len(reactions_s) - len(found)
    words = f"{label}; never: {never}" if never else label
    shares = [100 * (place + 1) / len(reactions_s) for place in range(len(found))]
    axes.step([1.0, *found], [0.0, *shares], where="post", color=colour, label=words)
