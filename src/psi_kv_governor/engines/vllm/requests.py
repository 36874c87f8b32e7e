"""The requests that hold blocks, and which of them stand still: plain bookkeeping of the scheduler's side."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from typing import Any, Protocol


class Request(Protocol):
    """What is used of vLLM's request."""

    request_id: str
    priority: int
    arrival_time: float
    num_computed_tokens: int


class Running:
    """One request that has blocks."""

    def __init__(self, number: int, request: Request) -> None:
        self.number = number
        self.request = request
        self.aside: set[int] | None = None
        """None while it runs; else the blocks that have to come back before it may go on."""

    @property
    def still(self) -> bool:
        """Whether it waits for its blocks."""
        return self.aside is not None

    @property
    def rank(self) -> tuple[int, float]:
        """Its place in vLLM's own order: the highest is preempted first."""
        return self.request.priority, self.request.arrival_time


class Requests:
    """All that hold blocks, by vLLM's id."""

    def __init__(self, hold: Callable[[Any, bool], None]) -> None:
        """`hold(request, still)` makes a request stand still, or lets it go on."""
        self._hold = hold
        self._all: dict[str, Running] = {}
        self._still: set[Running] = set()
        self._numbers = itertools.count(1)

    def __iter__(self) -> Iterator[Running]:
        return iter(list(self._all.values()))

    def __len__(self) -> int:
        return len(self._all)

    def admit(self, request: Request) -> Running:
        """It has blocks from now on."""
        known = self._all.get(request.request_id)
        if known is None:
            known = self._all[request.request_id] = Running(next(self._numbers), request)
        return known

    def leave(self, ids: Iterable[str]) -> None:
        """Their blocks are free: they ended, or vLLM preempted them by itself."""
        for request_id in ids:
            gone = self._all.pop(request_id, None)
            if gone is not None and gone.still:
                self._still.discard(gone)
                self._hold(gone.request, False)

    def find(self, number: int) -> Running | None:
        """The request with this number."""
        return next((one for one in self if one.number == number), None)

    @property
    def still(self) -> list[Running]:
        """Those that stand still, the first to go on first."""
        return sorted(self._still.copy(), key=lambda one: one.rank)

    @property
    def moving(self) -> list[Running]:
        """The others, in vLLM's own order."""
        return sorted((one for one in self if not one.still), key=lambda one: one.rank)

    @property
    def may_stand_still(self) -> list[Running]:
        """The lowest in vLLM's order first; never the first one of all: somebody has to go on."""
        return self.moving[:0:-1]

    def stop(self, one: Running, blocks: Iterable[int]) -> bool:
        """Have it stand still with its blocks aside. False where it is the last that runs, or has none."""
        aside = set(blocks)
        if not aside or one not in self.may_stand_still:
            return False
        one.aside = aside
        self._still.add(one)
        self._hold(one.request, True)
        return True

    def came_back(self, one: Running, blocks: Iterable[int]) -> None:
        """Blocks of it are in memory again; with the last of them it goes on."""
        if one.aside is not None:
            one.aside -= set(blocks)
            if not one.aside:
                self.go_on(one)

    def go_on(self, one: Running) -> None:
        """It runs again with the next step; what is still parked is read as it is needed."""
        one.aside = None
        self._still.discard(one)
        self._hold(one.request, False)

    def somebody_moves(self) -> Running | None:
        """Where all stand still, the first goes on: gives it."""
        still = self.still
        if not still or self.moving:
            return None
        self.go_on(still[0])
        return still[0]


def blocks_at(groups: Sequence[Sequence[int]], positions: Iterable[tuple[int, int]], size: int) -> set[int]:
    """The blocks, of each group of layers, that hold some of `positions`; `size` tokens are in one."""
    return {
        group[index]
        for start, stop in positions
        for group in groups
        for index in range(start // size, min(len(group), -(-stop // size)))
    }


def positions_of(
    groups: Sequence[Sequence[int]], blocks: Set[int], size: int, tokens: int
) -> list[tuple[int, int]]:
    """The positions, below `tokens`, of which some group has one of `blocks`: sorted, and cut at blocks."""
    indexes = sorted({index for group in groups for index, block in enumerate(group) if block in blocks})
    return [(i * size, min(tokens, (i + 1) * size)) for i in indexes if i * size < tokens]
