"""The agent of this process, where its caches are born and parked, and what is asked of one model of it."""

from __future__ import annotations

import functools
import os
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

from psi_kv_governor.cache import (
    Capabilities,
    Capability,
    Description,
    Evidence,
    Kind,
    Plan,
    Result,
    Snapshot,
)
from psi_kv_governor.config import GovernorConfig
from psi_kv_governor.engines.llama.client import BufferInfo, Client, InProcess
from psi_kv_governor.engines.llama.engine import LlamaEngine
from psi_kv_governor.engines.llama.loader import load
from psi_kv_governor.errors import BadInputError, EngineError
from psi_kv_governor.pressure.reading import Reading, one_level
from psi_kv_governor.residence import NO_PLACE, Place, choose_backing, find_place, swap_state


class Chosen(NamedTuple):
    """Where caches are born and parked."""

    folder: str
    """Empty where there is no place to park."""
    backing: str
    why: str
    place: Place | None = None


opening = threading.RLock()
"""Held while a model is opened: the agent has one place at a time."""


@functools.cache
def client() -> Client:
    """The client of this process' agent. Raises EngineError where there is none."""
    agent = load().agent
    if agent is None:
        raise EngineError(load().why)
    return Client(InProcess(agent.serve))


def choose(config: GovernorConfig) -> Chosen:
    """Where `config` has caches live on this machine. Raises BadInputError for a folder that was named and
    can't be used: a mistake, and not a machine's limit."""
    search = find_place(
        config.place, limit_bytes=config.place_limit_bytes, reserve_bytes=config.place_reserve_bytes
    )
    if search.place is None and config.place not in {"", NO_PLACE}:
        raise BadInputError(search.why_none)
    backing, why = choose_backing(config.backing, search.place, *swap_state())
    folder = search.place.folder if search.place else ""
    return Chosen(folder, backing, why if folder else search.why_none, search.place)


def prepare(config: GovernorConfig) -> Chosen:
    """Have the caches that are opened from now on live where `config` says. Raises EngineError without an
    agent, and what `choose` raises."""
    agent = load().agent
    if agent is None:
        raise EngineError(load().why)
    chosen = choose(config)
    agent.configure(
        chosen.folder,
        in_file=chosen.backing == "file",
        reserve_bytes=config.place_reserve_bytes,
        limit_bytes=config.place_limit_bytes,
    )
    return chosen


def engine(chosen: Chosen, context: Callable[[], int] | None = None) -> LlamaEngine:
    """The engine of this process' caches, or with `context` of those of one llama_context (its address)."""
    return LlamaEngine(
        client(),
        pid=os.getpid(),
        place=chosen.folder,
        backing=chosen.backing,
        why_backing=chosen.why,
        context=context,
    )


def newest_buffer() -> int:
    """The number of the buffer of a cache that was made last; 0 where there is none."""
    return max((one.number for one in client().buffers()), default=0)


def buffers_after(number: int) -> list[BufferInfo]:
    """The buffers of caches that were made after the one with this number."""
    return [one for one in client().buffers() if one.number > number]


class Unseen:
    """A `PressureSource` that looks at nothing, and so is calm: where looking is death, or what is to be seen
    is no concern."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._last_s = time.monotonic()

    def read(self) -> Reading:
        """See PressureSource."""
        before_s, self._last_s = self._last_s, time.monotonic()
        return one_level(time_s=self._last_s, interval_s=self._last_s - before_s, source=self.name)

    def close(self) -> None:
        """See PressureSource."""


class NoEngine:
    """An `Engine` without caches, for a model that can't be governed: it runs as without us."""

    def __init__(self, why: str) -> None:
        self._why = why

    def describe(self) -> Description:
        """See Engine."""
        unable = Capability(able=False, why=self._why)
        return Description(
            engine="llama",
            capabilities=Capabilities(release=unable, park=unable, mask=unable, blobs=unable, evict=unable),
        )

    def snapshot(self) -> Snapshot:
        """See Engine."""
        return Snapshot(time_s=0.0)

    def apply(self, plan: Plan) -> Result:
        """See Engine."""
        del plan
        return Result(problem=self._why)

    def collect(self, kinds: frozenset[Kind]) -> None:
        """See Engine."""

    def evidence(self, cache: int, sequence: int) -> Evidence:
        """See Engine."""
        raise EngineError(self._why)

    def close(self) -> None:
        """See Engine."""
