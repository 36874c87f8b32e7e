"""Who of several governors gives first, and who takes first."""

from __future__ import annotations

from typing import NamedTuple

from psi_kv_governor.control.decision import CacheSnapshot
from psi_kv_governor.control.view import View
from psi_kv_governor.pressure.reading import MACHINE, Reading

_ITS_TURN_S = 1.0
"""How long one that gives first is waited for: three steps of its. One that is stopped or stuck keeps nobody
else from giving."""

_TURN_S = 0.5
"""So much later each next one begins to take: two readings of a calm machine, by which it sees the one before
it restoring."""


class Order(NamedTuple):
    """This governor among its neighbours, those of the same user that share the level in question."""

    share: float = 1.0
    """Its part of all that the neighbours can give together (0 to 1)."""
    givers_before: int = 0
    """Neighbours that were used less recently and still have something to give."""
    takers_before: int = 0
    """Neighbours that were used more recently and wait for something of theirs."""
    alone: bool = True
    """No neighbour is known."""
    taking: str = ""
    """Which neighbour is restoring now; '' for none."""

    def why_not_give(self, pressed_s: float, *, acute: bool) -> str:
        """Why this one does not give yet, `pressed_s` after the pressure began; '' when it may."""
        if acute or not self.givers_before or pressed_s >= _ITS_TURN_S * self.givers_before:
            return ""
        return f"{self.givers_before} caches that were used less recently give first"

    def why_not_take(self) -> str:
        """Why this one does not begin a restore; '' when it may."""
        return f"the governor {self.taking} is restoring into the same memory" if self.taking else ""

    @property
    def turn_s(self) -> float | None:
        """How much longer than the quiet time this one waits; None where no neighbour is known."""
        return None if self.alone else _TURN_S * self.takers_before


_ALONE = Order()


def order_of(reading: Reading, now: View, cache: CacheSnapshot) -> Order:
    """The order at the level that decides; who was used at the same moment is ordered by its name."""
    if not reading.neighbours:
        return _ALONE
    sharing = [one for one in reading.neighbours if now.level in one.levels or MACHINE in one.levels]
    near = [one for one in sharing if now.level in one.levels]
    if not sharing:
        return _ALONE
    all_bytes = cache.trimmable_bytes + sum(one.trimmable_bytes for one in near)
    own = (cache.last_used_s, "")
    return Order(
        alone=False,
        share=cache.trimmable_bytes / all_bytes if all_bytes else 1.0,
        givers_before=sum(one.trimmable_bytes > 0 and (one.last_used_s, one.id) < own for one in near),
        takers_before=sum(one.masked_bytes > 0 and (one.last_used_s, one.id) > own for one in sharing),
        taking=next((one.id for one in sharing if one.restoring), ""),
    )
