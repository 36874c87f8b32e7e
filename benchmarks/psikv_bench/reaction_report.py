"""What the onsets of the latency scene come to: times of reaction, and what they cost tokens."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Sequence

import msgspec

from psi_kv_governor.quantile import quantile
from psikv_bench.figures import Asked, Figure, figure, ms
from psikv_bench.messages import Variant, is_governed
from psikv_bench.record import Table
from psikv_bench.trials.series import Near

P50, P99 = Asked("<=", 50), Asked("<=", 150)
"""Asked of each mode, beside a neighbour as fast as it can be."""
POLL_S = 1.0
"""As the published method polls."""


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
    polled_s: float | None
    """To when a poller of avg10 would have seen its threshold."""
    returned_bytes: int
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
        return self.returned_s is not None and self.reaction_s == 0.0

    @property
    def reaction_s(self) -> float | None:
        """From the sign to the bytes back; 0 where they were back before it. None: nothing came back."""
        return self.after_sign(self.returned_s)

    def after_sign(self, seen_s: float | None) -> float | None:
        """From the sign to what was seen; 0 where it was before it, or there never was one."""
        if seen_s is None:
            return None
        return 0.0 if self.signal_s is None else max(0.0, seen_s - self.signal_s)


def _by_mode(found: Iterable[Reaction]) -> dict[str, list[Reaction]]:
    modes: dict[str, list[Reaction]] = {}
    for one in found:
        modes.setdefault(one.mode, []).append(one)
    return modes


def _governed(found: Iterable[Reaction]) -> list[Reaction]:
    return [one for one in found if is_governed(one.variant)]


def _known_ms(values: Iterable[float | None]) -> list[float]:
    return [1e3 * value for value in values if value is not None]


def figures(found: Sequence[Reaction]) -> Iterator[Figure]:
    """Reaction in each mode, beside what is asked."""
    for mode, mine in _by_mode(_governed(found)).items():
        if not (values := _known_ms(one.reaction_s for one in mine)):
            continue
        since_byte = _known_ms(one.returned_s for one in mine)
        yield figure("bytes back, p50", "ms", values, P50, case=mode)
        yield figure("bytes back, p99", "ms", [quantile(values, 0.99)], P99, case=mode)
        yield figure("bytes back, worst", "ms", [max(values)], case=mode)
        yield figure("the same from the neighbour's first byte, p50", "ms", since_byte, case=mode)
        yield figure("and p99", "ms", [quantile(since_byte, 0.99)], case=mode)


def tables(found: Sequence[Reaction]) -> list[Table]:
    """The governor's reaction and the poller's, and the times of tokens."""
    columns = ["while", "who", "onsets", "stall / headroom / none", "before it", "never"]
    columns += [f"{since}{what}" for since in ("sign: ", "byte: ") for what in ("p50 ms", "p99", "worst")]
    rows = [row for mode, some in _by_mode(found).items() for row in _rows(mode, some)]
    whiles = {
        "calm": "calm",
        "beside the neighbour": "pressed",
        "near a trim": "trim",
        "near a restore": "restore",
    }
    tokens = []
    for words, name in whiles.items():
        token_s = [seconds for one in _governed(found) for seconds in getattr(one.near, name)]
        tokens.append([words, str(len(token_s)), *_spread(token_s)])
    title = "Reaction: from the first sign of need, and from the neighbour's first byte"
    return [
        Table(title=title, columns=columns, rows=rows),
        Table(
            title="Time of a token", columns=["while", "tokens", "p50 ms", "p99 ms", "max ms"], rows=tokens
        ),
    ]


def _rows(mode: str, some: Sequence[Reaction]) -> Iterator[list[str]]:
    mine = _governed(some)
    control = [one for one in some if one not in mine]
    if mine:
        early = str(sum(one.before_sign for one in mine))
        yield _row(mode, "governor, bytes back", mine, early, [one.returned_s for one in mine])
    for who, these in (("governed", mine), ("ungoverned", control)):
        if these:
            words = f"poll avg10 every {POLL_S:g} s, {who}"
            yield _row(mode, words, these, "", [one.polled_s for one in these])


def _row(
    mode: str, who: str, found: Sequence[Reaction], early: str, seen_s: Sequence[float | None]
) -> list[str]:
    signs = [sum(one.signal == what for one in found) for what in ("stall", "headroom", "")]
    pairs = list(zip(found, seen_s, strict=True))
    never = sum(seconds is None and one.needed for one, seconds in pairs)
    counts = [str(len(found)), " / ".join(map(str, signs)), early, str(never)]
    since_sign = [one.after_sign(seconds) for one, seconds in pairs]
    return [mode, who, *counts, *_spread(since_sign), *_spread(seen_s)]


def _spread(seconds: Iterable[float | None]) -> list[str]:
    known = [value for value in seconds if value is not None]
    if not known:
        return ["-"] * 3
    return [ms(statistics.median(known)), ms(quantile(known, 0.99)), ms(max(known))]


def notes(found: Sequence[Reaction], avg10: float, hold_max_s: float) -> list[str]:
    """How to read it."""
    governed = _governed(found)
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
