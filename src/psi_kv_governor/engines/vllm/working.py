"""A worker's side: the memory of its part of the cache, and what is done with it."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from psi_kv_governor.config import GovernorConfig
from psi_kv_governor.engines.vllm.born import Memory
from psi_kv_governor.engines.vllm.layout import LayoutError
from psi_kv_governor.engines.vllm.messages import About, Report, Step
from psi_kv_governor.engines.vllm.parker import Parker
from psi_kv_governor.pressure import discover
from psi_kv_governor.pressure.reading import PressureSource, Reading
from psi_kv_governor.residence import choose_backing, find_place, swap_state

IDLE_SLICE_S = 0.05
"""Longest that an empty step works: a request that comes meanwhile waits for it."""
_MOST_COUNTED_BYTES = 4 << 30
"""Beyond it the kernel is not asked page by page what is in memory: 1 GiB takes it some milliseconds."""


class Working:
    """One rank."""

    def __init__(self, settings: GovernorConfig, rank: int, n_blocks: int, n_bytes: int) -> None:
        self._rank = rank
        self._n_blocks = n_blocks
        search = find_place(
            settings.place, limit_bytes=settings.place_limit_bytes, reserve_bytes=settings.place_reserve_bytes
        )
        backing, self._why_backing = choose_backing(
            settings.backing, search.place, *swap_state(), n_bytes=n_bytes
        )
        self._memory = Memory(backing, search.place)
        self._place = search.place.folder if search.place else ""
        self._parker: Parker | None = None
        self._why_not = "its cache was not allocated yet"
        self._source: PressureSource | None = None
        self._look = False

    def memory_context(self) -> AbstractContextManager[None]:
        """While it is open, the cache is allocated."""
        return self._memory.answering()

    def registered(self, caches: Mapping[str, Any]) -> str:
        """The cache is there. Gives why it can't be parked; '' where it can."""
        try:
            layout = self._memory.layout(caches, self._n_blocks)
        except LayoutError as error:
            self._why_not = str(error)
            return self._why_not
        self._parker = Parker(self._memory.mappings, layout)
        self._block_bytes = layout.block_bytes
        self._parker.start()
        self._why_not = ""
        return ""

    @property
    def about_backing(self) -> str:
        """Where the cache lives, and why, for the log."""
        born = {mapping.backing for mapping in self._memory.mappings}
        return (
            f"{'file' if 'file' in born else 'memory'} ({self._why_backing}), place {self._place or 'none'}"
        )

    def begin(self, step: Step) -> None:
        """Before the forward pass: whatever it uses is left alone from here on."""
        self._look = step.look
        if self._parker is not None:
            self._parker.claim(step.used)
            self._parker.blank(step.blank)
            if step.orders:
                self._parker.order(step.orders)

    def end(self, step: Step) -> None:
        """Nothing is computed in this step: the work is done at once."""
        if step.idle and self._parker is not None:
            self._parker.work(time.monotonic() + IDLE_SLICE_S)

    @property
    def silent(self) -> bool:
        """Whether there is nothing to send back with the step."""
        return not self._look and (self._parker is None or not self._parker.has_finished)

    def report(self) -> Report:
        """What is sent back with the step."""
        look, self._look = self._look, False
        finished = {} if self._parker is None else self._parker.finished()
        return Report(finished, {self._rank: self._about()} if look or finished else {})

    def _about(self) -> About:
        mappings = self._memory.mappings
        small = sum(mapping.n_bytes for mapping in mappings) <= _MOST_COUNTED_BYTES
        return About(
            host=this_host(),
            pid=os.getpid(),
            block_bytes=self._block_bytes if self._parker is not None else 0,
            backing="file" if any(mapping.backing == "file" for mapping in mappings) else "memory",
            place=self._place,
            why_not=self._why_not,
            resident_bytes=sum(mapping.resident_bytes() for mapping in mappings) if small else 0,
            stored_bytes=sum(mapping.stored_bytes for mapping in mappings),
            reading=self._reading(),
        )

    def _reading(self) -> Reading | None:
        try:
            if self._source is None:
                self._source = discover().source
            return None if self._source is None else self._source.read()
        except Exception:  # the next look searches anew
            self._close_source()
            return None

    def _close_source(self) -> None:
        source, self._source = self._source, None
        if source is not None:
            with contextlib.suppress(Exception):
                source.close()

    def close(self) -> None:
        """Begin nothing more; the memory stays as long as its tensors."""
        if self._parker is not None:
            self._parker.close()
        self._close_source()


def this_host() -> str:
    """A name for the machine, and the memory cgroup on it, that two of them do not share: what a rank gives
    up helps nobody outside of these."""
    try:
        machine = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        machine = socket.gethostname()
    with contextlib.suppress(OSError):
        space = Path("/proc/self/ns/cgroup").readlink()
        groups = Path("/proc/self/cgroup").read_text().split()
        own = [group for group in groups if group.startswith("0::") or "memory" in group.split(":")[1]]
        return " ".join([machine, str(space), *own])
    return machine
