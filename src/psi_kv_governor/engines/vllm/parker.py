"""A worker's hands: what the scheduler ordered is done in slices, beside the forward pass or between two."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from psi_kv_governor.engines.vllm.layout import Layout
from psi_kv_governor.engines.vllm.messages import Finished, Kind, Order
from psi_kv_governor.residence import Done, Mapping

SLICE_BYTES = 16 << 20
"""Unit of work: at 1 GB/s 16 ms, the longest that a block which is wanted at once is waited for."""


@dataclass
class _Open:
    """An order that is being carried out."""

    order: Order
    left: deque[int]
    done: Finished


class Parker:
    """Carries orders out. One thread works at a time; `claim` may come from the engine's at any moment."""

    def __init__(self, mappings: list[Mapping], layout: Layout) -> None:
        self._mappings = mappings
        self._layout = layout
        self._lock = threading.Lock()
        """Held for the bookkeeping only."""
        self._work = threading.Condition(self._lock)
        self._slice = threading.Lock()
        """Held while bytes move."""
        self._open: deque[_Open] = deque()
        self._at: frozenset[int] = frozenset()
        self._finished: dict[int, Finished] = {}
        self._closed = False
        self._thread: threading.Thread | None = None

    @property
    def busy(self) -> bool:
        """Whether an order is open."""
        with self._lock:
            return bool(self._open)

    @property
    def has_finished(self) -> bool:
        """Whether `finished` has something to say."""
        return bool(self._finished)

    def start(self) -> None:
        """Work in a thread of its own from now on, too."""
        self._thread = threading.Thread(target=self._run, name="psi-kv-parker", daemon=True)
        self._thread.start()

    def claim(self, blocks: Iterable[int]) -> None:
        """These are used from now on: nothing is done with them any more once this returns."""
        wanted = frozenset(blocks)
        if not wanted:
            return
        with self._lock:
            for one in self._open:
                one.left = deque(block for block in one.left if block not in wanted)
            wait = bool(self._at & wanted)
        if wait:
            with self._slice:
                pass

    def blank(self, blocks: Iterable[int]) -> None:
        """Whoever claimed these writes them anew: what a file has of them is not to be read for that."""
        wanted = list(blocks)
        if wanted:
            with self._slice:
                self._do(Kind.RELEASE, wanted)
                self._do(Kind.BACK, wanted)  # zeros without a read; a fault would read the neighbours around

    def order(self, orders: Iterable[Order]) -> None:
        """Do these, in order."""
        with self._work:
            self._open += (_Open(order, deque(order.blocks), Finished()) for order in orders)
            self._work.notify()

    def work(self, until_s: float) -> None:
        """Work in the calling thread until this (monotonic) time, or until nothing is left."""
        while time.monotonic() < until_s and self._one_slice():
            pass

    def finished(self) -> dict[int, Finished]:
        """What was finished since the last call, by the number of the order."""
        with self._lock:
            found, self._finished = self._finished, {}
        return found

    def close(self) -> None:
        """Begin nothing more. Safe to call twice."""
        with self._work:
            self._closed = True
            self._open.clear()
            self._work.notify_all()

    def _run(self) -> None:
        while True:
            with self._work:
                while not self._open and not self._closed:
                    self._work.wait()
                if self._closed:
                    return
            self._one_slice()

    def _one_slice(self) -> bool:
        """False where nothing is left to do."""
        with self._slice:
            with self._lock:
                if not self._open:
                    return False
                one = self._open[0]
                count = max(1, SLICE_BYTES // max(1, self._layout.block_bytes))
                blocks = [one.left.popleft() for _ in range(min(count, len(one.left)))]
                self._at = frozenset(blocks)
            done = self._do(one.order.kind, blocks) if blocks else Finished()
            with self._lock:
                self._at = frozenset()
                one.done = one.done + done
                if not one.left and self._open and self._open[0] is one:
                    self._open.popleft()
                    self._finished[one.order.number] = _as_one(one.done)
                return bool(self._open)

    def _do(self, kind: Kind, blocks: list[int]) -> Finished:
        total = Finished()
        for number, parts in self._layout.parts(blocks).items():
            mapping = self._mappings[number]
            if kind is Kind.PARK:
                done = mapping.park(parts)
            elif kind is Kind.RELEASE:
                done = mapping.release(parts)
            elif kind is Kind.WRITE:
                done = mapping.write_behind(parts)
            else:
                done = mapping.unpark(parts)
            total = total + _told(done)
        return total


def _told(done: Done) -> Finished:
    return Finished(done.bytes_returned, done.bytes_back, done.written_bytes, done.problem)


def _as_one(done: Finished) -> Finished:
    """The slices of one rank count as one answer."""
    return Finished(done.bytes_returned, done.bytes_back, done.written_bytes, done.problem)
