"""Figures: measured quantities with their spread, beside what was asked of them."""

from __future__ import annotations

import operator
import statistics
from collections.abc import Callable, Sequence
from typing import Literal

import msgspec

Sign = Literal[">=", "<=", "<"]
Statistic = Literal["min", "median", "max"]

_HOLDS: dict[Sign, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    "<": operator.lt,
}
_COUNTED = frozenset({"tokens", "cells", "logits", "runs", "times"})


class Asked(msgspec.Struct, frozen=True):
    """A bound that one statistic of a figure has to keep."""

    sign: Sign
    bound: float
    statistic: Statistic = "median"
    """The median for timings, which a neighbour disturbs; the worst (min or max) for what has no noise."""


class Figure(msgspec.Struct, frozen=True, kw_only=True):
    """One measured quantity, with every value that was taken. Made with `figure`."""

    name: str
    case: str
    """What it was measured on, where there are several cases."""
    unit: str
    min: float
    median: float
    max: float
    values: list[float]
    """In the order in which they were taken."""
    asked: Asked | None
    """None: for information."""
    passed: bool | None

    @property
    def judged(self) -> float:
        """The statistic that is held against what was asked; the median where nothing was."""
        value: float = getattr(self, self.asked.statistic if self.asked else "median")
        return value

    @property
    def asked_words(self) -> str:
        """What was asked; empty where nothing was."""
        return f"{self.asked.sign} {shown(self.asked.bound, self.unit)}" if self.asked else ""

    @property
    def full_name(self) -> str:
        """With its case."""
        return self.name + (f" ({self.case})" if self.case else "")

    @property
    def missed_words(self) -> str:
        """What is said of one that misses what was asked."""
        return f"{self.full_name} is {measured(self.judged, self.unit)}, asked {self.asked_words}"

    @property
    def verdict(self) -> str:
        """All of it in a line."""
        passed = {True: "pass: ", False: "MISSED: ", None: ""}[self.passed]
        words = f"{passed}{self.full_name}: {measured(self.judged, self.unit)}"
        if len(self.values) > 1:
            words += f", {shown(self.min, self.unit)} to {shown(self.max, self.unit)}"
        return words + (f"; asked {self.asked_words}" if self.asked else "")


def figure(
    name: str, unit: str, values: Sequence[float], asked: Asked | None = None, case: str = ""
) -> Figure:
    """Sum `values` up and hold them against what was asked. Raises ValueError without values."""
    if not values:
        raise ValueError(f"no values of {name}")
    spread = {"min": min(values), "median": statistics.median(values), "max": max(values)}
    passed = None if asked is None else _HOLDS[asked.sign](spread[asked.statistic], asked.bound)
    return Figure(name=name, case=case, unit=unit, **spread, values=list(values), asked=asked, passed=passed)


def shown(value: float, unit: str) -> str:
    """A value as it is read: whole numbers for what is counted, percent for shares, else four figures."""
    if unit in _COUNTED:
        return f"{value:,.0f}" if value == int(value) else f"{value:,.1f}"
    if unit == "share":
        return f"{value:.1%}"
    return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"


def measured(value: float, unit: str) -> str:
    """The same with its unit."""
    return f"{shown(value, unit)} {'' if unit == 'share' else unit}".strip()


def spread(values: Sequence[float], scale: float = 1.0, form: str = "{:.0f}") -> str:
    """The median, and min to max where there are several values; a dash where there is none."""
    if not values:
        return "-"
    middle = form.format(statistics.median(values) * scale)
    if len(values) == 1:
        return middle
    return f"{middle} ({form.format(min(values) * scale)} to {form.format(max(values) * scale)})"


def ms(seconds: float | None) -> str:
    """Milliseconds; a dash for what never was."""
    return "-" if seconds is None else f"{1e3 * seconds:.0f}"
