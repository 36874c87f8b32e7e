"""An engine of one's own: conversations whose rows lie in memory that can be parked.

    python examples/own_engine.py

Nothing here knows of llama.cpp. `Rows` is what some program holds for each conversation, and `RowsEngine`
lets a governor park those that nobody is using. A package names such a module in the entry-point group
`psi_kv_governor.engines`.
"""

import functools
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from own_source import FreeBytes, tell_free_bytes

from psi_kv_governor import EngineError, Governor, GovernorConfig, cache
from psi_kv_governor.cache import Capability, Kind, Plan, Result, Step, Verb
from psi_kv_governor.residence import Done, Mapping, Place, find_place

ROW_BYTES = 4096
IDLE_S = 0.2
WHY_NO_MASK = "every row of a conversation is read"


class Rows:
    """One conversation: a row for each token."""

    def __init__(self, capacity: int, place: Place | None) -> None:
        self.memory = Mapping(capacity * ROW_BYTES, place=place)
        self.array = np.frombuffer(self.memory.buffer, dtype=np.uint8).reshape(capacity, ROW_BYTES)
        self.length, self.used_s = 0, 0.0

    def append(self, rows: np.ndarray) -> None:
        self.array[self.length : self.length + len(rows)] = rows
        self.length, self.used_s = self.length + len(rows), time.monotonic()


class RowsEngine:
    """An `Engine` of all that is in `conversations`: each is a cache of one sequence."""

    def __init__(self, place: Place | None, why_none: str = "") -> None:
        self.conversations: list[Rows] = []
        self._place, self._why_none = place, why_none

    def open(self, capacity: int) -> Rows:
        self.conversations.append(Rows(capacity, self._place))
        return self.conversations[-1]

    def describe(self) -> cache.Description:
        capabilities = cache.Capabilities(
            release=Capability(False, "only rows that are used take memory"),
            park=Capability(self._place is not None, self._why_none),
            mask=Capability(False, WHY_NO_MASK),
            blobs=Capability(False, "there are no saved states"),
        )
        return cache.Description(engine="rows", capabilities=capabilities)

    def snapshot(self) -> cache.Snapshot:
        now_s = time.monotonic()
        caches = [self._state(number, rows, now_s) for number, rows in enumerate(self.conversations)]
        return cache.Snapshot(time_s=now_s, caches=tuple(caches))

    def _state(self, number: int, rows: Rows, now_s: float) -> cache.CacheState:
        resident = rows.memory.resident_bytes()
        one = cache.SequenceState(
            id=0,
            next_position=rows.length,
            live=(cache.Range(0, rows.length),),
            parked_bytes=max(0, rows.length * ROW_BYTES - resident),
            running=now_s - rows.used_s < IDLE_S,
            last_used_s=rows.used_s,
        )
        return cache.CacheState(
            id=number,
            name=f"conversation {number}",
            pid=0,
            capacity_cells=len(rows.array),
            cell_bytes=ROW_BYTES,
            row_bytes=ROW_BYTES,
            resident_bytes=resident,
            maskable=False,
            why_not_maskable=WHY_NO_MASK,
            sequences=(one,) if rows.length else (),
        )

    def apply(self, plan: Plan) -> Result:
        began_s, total = time.monotonic(), Result()
        for step in plan.steps:
            left_s = plan.deadline_s - (time.monotonic() - began_s)
            total = total.plus(self._step(step, left_s, plan.max_bytes))
        return total.plus(Result(seconds=time.monotonic() - began_s))

    def _step(self, step: Step, left_s: float, max_bytes: int | None) -> Result:
        rows = self.conversations[step.cache]
        can: dict[Verb, Callable[..., Done]] = {
            Verb.PARK: rows.memory.park,
            Verb.WRITE_BEHIND: rows.memory.write_behind,
            Verb.UNPARK: functools.partial(rows.memory.unpark, max_bytes=max_bytes),
        }
        if step.verb not in can:
            return Result()
        done = can[step.verb]([(0, rows.length * ROW_BYTES)], deadline_s=left_s)
        return Result(
            bytes_returned=done.bytes_returned,
            bytes_back=done.bytes_back,
            cells=(done.bytes_returned + done.bytes_back) // ROW_BYTES,
            written_bytes=done.written_bytes,
            done=done.finished,
            problem=done.problem,
        )

    def collect(self, kinds: frozenset[Kind]) -> None:
        """Nothing to gather: nothing is masked, so no policy is asked."""

    def evidence(self, cache: int, sequence: int) -> cache.Evidence:
        raise EngineError("no policy is asked where nothing can be masked")

    def close(self) -> None:
        """Nothing is masked that would have to be looked at again."""


if __name__ == "__main__":
    found = find_place()
    engine, free = RowsEngine(found.place, found.why_none), Path(tempfile.mkdtemp()) / "free"
    tell_free_bytes(free, 8 << 30, 16 << 30)
    random = np.random.default_rng(0)
    texts = [random.integers(0, 256, (4096, ROW_BYTES), dtype=np.uint8) for _ in range(3)]
    for text in texts:
        engine.open(8192).append(text)
    with Governor(engine, source=FreeBytes(free), config=GovernorConfig(status_socket=False)) as governor:
        events: list[object] = []
        governor.subscribe(events.append)
        print("calm:", sum(one.memory.resident_bytes() for one in engine.conversations) >> 20, "MiB")
        tell_free_bytes(free, 64 << 20, 16 << 30)
        until_s = time.monotonic() + 60
        while (left := sum(one.memory.resident_bytes() for one in engine.conversations)) > 40 << 20:
            assert time.monotonic() < until_s, events
            time.sleep(0.05)
        print("pressed:", left >> 20, "MiB")
    pairs = zip(engine.conversations, texts, strict=True)
    print("the same rows:", all(np.array_equal(one.array[: one.length], text) for one, text in pairs))
