"""The steps of a plan, each done to one cache at rest."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from typing import NamedTuple

from psi_kv_governor.cache import Range, Step, Verb, cells_in
from psi_kv_governor.engines.transformers.cache import GovernedCache
from psi_kv_governor.engines.transformers.places import cells_after, first_cells
from psi_kv_governor.residence import Done

CHUNK_BYTES = 64 << 20
"""Rows that are moved aside or brought back between two looks at the clock: 512 cells of an 8B model."""
NOTHING_THROWN_AWAY = "there is a place to park, so nothing is thrown away"


class Account(NamedTuple):
    """What a plan still allows, and what was done so far."""

    until: float
    max_bytes: float
    sums: dict[str, int]
    problems: list[str]

    def add(self, **sums: int) -> None:
        for name, number in sums.items():
            self.sums[name] = self.sums.get(name, 0) + number

    @property
    def moved_bytes(self) -> int:
        return self.sums.get("bytes_returned", 0) + self.sums.get("bytes_back", 0)

    @property
    def left_bytes(self) -> float:
        return self.max_bytes - self.moved_bytes

    @property
    def up(self) -> bool:
        return time.monotonic() > self.until or self.left_bytes <= 0

    @property
    def left_s(self) -> float:
        return max(0.0, self.until - time.monotonic())


def do(cache: GovernedCache, step: Step, account: Account) -> None:
    """Carry out `step`, as far as `account` allows, and enter what was done."""
    _DOING[step.verb](cache, step, account)


def _write_behind(cache: GovernedCache, step: Step, account: Account) -> None:
    del step
    _each(cache, account, lambda mapping, parts, left: mapping.write_behind(parts, left))


def _park(cache: GovernedCache, step: Step, account: Account) -> None:
    del step
    account.add(bytes_returned=cache.release())
    cache.parked = True
    if _each(cache, account, lambda mapping, parts, left: mapping.park(parts, left)):
        account.add(cells=cache.places.live_cells)


def _unpark(cache: GovernedCache, step: Step, account: Account) -> None:
    del step
    for rows in cache.tensors:
        left = None if math.isinf(account.left_bytes) else int(account.left_bytes)
        done = rows.mapping.unpark(rows.parts(), left, account.left_s)
        account.add(bytes_back=done.bytes_back)
        if done.problem or not done.finished:
            account.add(cut=1)
            account.problems.extend(filter(None, [done.problem]))
            return
    account.add(cells=cache.places.live_cells)


def _each(cache: GovernedCache, account: Account, do: Callable[..., Done]) -> bool:
    """Do something to the rows of every tensor; false where it was cut short."""
    for rows in cache.tensors:
        if account.up:
            account.add(cut=1)
            return False
        done = do(rows.mapping, rows.parts(), account.left_s)
        account.add(bytes_returned=done.bytes_returned, written_bytes=done.written_bytes)
        cache.written_bytes += done.written_bytes
        if done.problem or not done.finished:
            account.add(cut=1)
            account.problems.extend(filter(None, [done.problem]))
            return False
    return True


def _release(cache: GovernedCache, step: Step, account: Account) -> None:
    del step
    account.add(bytes_returned=cache.release())


def _take_out(cache: GovernedCache, step: Step, account: Account, *, keep: bool) -> None:
    wanted = cache.places.live_part(step.ranges or [Range(0, cache.places.next_position)])
    for chunk in _chunks(wanted, cache, account):
        before = cache.written_bytes
        returned, problem = cache.take_out(chunk, keep=keep)
        if problem:
            account.problems.append(problem)
            return
        cells = cells_in(chunk)
        masked = cells if keep else 0
        account.add(
            bytes_returned=returned, cells=cells, masked=masked, written_bytes=cache.written_bytes - before
        )


def _mask(cache: GovernedCache, step: Step, account: Account) -> None:
    _take_out(cache, step, account, keep=True)


def _evict(cache: GovernedCache, step: Step, account: Account) -> None:
    if cache.place is not None:
        account.problems.append(NOTHING_THROWN_AWAY)
        return
    _take_out(cache, step, account, keep=False)


def _unmask(cache: GovernedCache, step: Step, account: Account) -> None:
    wanted = cache.places.masked_part(step.ranges or cache.places.masked)
    for chunk in _chunks(wanted, cache, account):
        try:
            cells = cache.put_back(chunk)
        except (OSError, MemoryError) as error:
            account.problems.append(f"it can't be brought back: {error}")
            return
        account.add(bytes_back=cells * cache.cell_bytes, cells=cells)


_DOING: dict[Verb, Callable[[GovernedCache, Step, Account], None]] = {
    Verb.WRITE_BEHIND: _write_behind,
    Verb.RELEASE: _release,
    Verb.PARK: _park,
    Verb.MASK: _mask,
    Verb.EVICT: _evict,
    Verb.UNMASK: _unmask,
    Verb.UNPARK: _unpark,
}


def _chunks(wanted: list[Range], cache: GovernedCache, account: Account) -> Iterable[list[Range]]:
    """`wanted` piece by piece, while the plan allows it; a piece is never larger than the bytes left."""
    while wanted:
        allowed = min(CHUNK_BYTES, account.left_bytes) // max(1, cache.cell_bytes)
        if account.up or allowed < 1:
            account.add(cut=1)
            return
        chunk = first_cells(wanted, int(allowed))
        wanted = cells_after(wanted, chunk[-1].stop)
        yield chunk
