"""The source that is read now, what wakes the loop for it, and the search for another when one is gone."""

from __future__ import annotations

import math
import time
import weakref

import msgspec

from psi_kv_governor.bus import Bus
from psi_kv_governor.control.decision import CacheSnapshot
from psi_kv_governor.control.state import LawState
from psi_kv_governor.errors import SourceLostError
from psi_kv_governor.events import SourceChanged
from psi_kv_governor.pressure import discover
from psi_kv_governor.pressure.discovery import Discovery
from psi_kv_governor.pressure.machine import MachineSource, MovedError
from psi_kv_governor.pressure.neighbours import Neighbourhood, Neighbours
from psi_kv_governor.pressure.processes import Processes, only_this
from psi_kv_governor.pressure.reading import Bounds, PressureSource, Reading, Standing
from psi_kv_governor.pressure.sleeper import Sleeper
from psi_kv_governor.pressure.waking import find_waker

# Where no source is left, how long until the next search.
_REDISCOVER_S = 10.0

# While a better rung of the ladder may come back: a search takes about 0.3 ms, a hundred thousandth of this.
_CLIMB_S = 30.0

# What failed is left alone for so long; twice as long when it fails again within the time after that.
_BACKOFF_S = 10.0
_LONGEST_BACKOFF_S = 640.0


class Sensor:
    """Reads `source`, or the best source of this machine. A source that was given is not closed here, and is
    read again as soon as it answers, where it was lost for a while.

    One thread reads and waits; `interrupt` and `close` may come from any other.
    """

    def __init__(
        self,
        source: PressureSource | None,
        bus: Bus,
        neighbours: Neighbourhood | None = None,
        processes: Processes = only_this,
    ) -> None:
        """`processes` gives the ids of those that hold the caches: this one, or governed programs."""
        self.source = self._given = source
        self.sleeper = Sleeper()
        """What `wait` sleeps on. A thread that holds it, and not the sensor, keeps nothing else alive."""
        if neighbours is None and source is None:
            neighbours = Neighbours(processes=processes)
        self.neighbours = neighbours
        """The other governors of this user; beside a source that was given, those that were given."""
        self._bus = bus
        self._processes = processes
        self._box = _Box()
        self._backoff = _Backoff()
        self._reading: Reading | None = None
        self._rank = 0
        self._waker_fell = False
        self._look_again_s = math.inf
        # Also when the governor is only dropped.
        weakref.finalize(self, self._box.close)
        weakref.finalize(self, self.sleeper.close)
        if source is None:
            self._find("at start")

    @property
    def name(self) -> str:
        """What is read, in words."""
        return self.source.name if self.source else "none"

    def wait(self, timeout_s: float) -> None:
        """Sleep `timeout_s`, or until a trigger fires, or another thread calls `interrupt`.

        A trigger ends at most one sleep in `sleeper.REST_S`, whatever it does.
        """
        self.sleeper.wait(timeout_s)

    def interrupt(self) -> None:
        """End the sleep of another thread, or its next one."""
        self.sleeper.wake()

    @property
    def glances(self) -> bool:
        """Whether the source knows a glance."""
        return isinstance(self.source, MachineSource)

    def glance(self, bounds: Bounds) -> float | None:
        """The time, where nothing is to be seen that the last reading did not tell; None where one is due.

        It always is of a source that knows no glance.
        """
        if self.sleeper.lost or time.monotonic() >= self._look_again_s:
            return None
        return self.source.glance(bounds) if isinstance(self.source, MachineSource) else None

    def read(self) -> Reading | None:
        """A reading now; None where there is nothing to read, or the source was lost just now."""
        if self.sleeper.lost:
            self._waker_lost(self.sleeper.lost)
        if time.monotonic() >= self._look_again_s:
            self._find("looked again") if self.source is None else self._climb()
        if self.source is None:
            return None
        try:
            self._reading = self.source.read()
            if self.neighbours is not None:
                near = self.neighbours.read(self._reading.levels)
                if near != self._reading.neighbours:
                    self._reading = msgspec.structs.replace(self._reading, neighbours=near)
            return self._reading
        except MovedError as error:
            self._leave(str(error))
        except SourceLostError as error:
            self._backoff.failed(self.name, time.monotonic())
            self._leave(str(error))
        return None

    def tell_neighbours(self, cache: CacheSnapshot, state: LawState) -> None:
        """Say to the other governors how this one stands after a turn."""
        if self.neighbours is None or self._reading is None:
            return
        standing = Standing(
            last_used_s=cache.last_used_s,
            trimmable_bytes=cache.trimmable_bytes,
            masked_bytes=cache.masked_bytes,
            restoring=state.run_bytes > 0,
            claim_bytes=state.run_bytes,
            resident_bytes=self._reading.own_resident_bytes or 0,
        )
        self.neighbours.say(self._reading.levels, standing)

    def close(self) -> None:
        """Give back what was found here. Safe to call twice."""
        if self.neighbours is not None:
            self.neighbours.close()
        self.sleeper.close()
        self._box.close()

    # -- up and down the ladder -------------------------------------------------------------------------

    def _find(self, why: str) -> None:
        """Take the best source there is, and what wakes for it."""
        if self._given_answers():
            return
        found = discover(avoid=self._backoff.left_out(time.monotonic()), processes=self._processes)
        if found.source is None:
            self.source = None
            self.sleeper.watch(None)
            self._look_again_s = time.monotonic() + _REDISCOVER_S
            nothing = "no source of memory pressure here (see `psi-kv doctor`)"
            self._bus.degrade("sensing", found.off or nothing)
            return
        self._take(found, found.source, why)

    def _take(self, found: Discovery, source: PressureSource, why: str) -> None:
        self.source, self._rank = source, found.rank
        self._box.hold(source)
        self._arm()
        self._bus.tell(SourceChanged(time_s=time.monotonic(), source=source.name, why=why))

    def _arm(self) -> None:
        now_s = time.monotonic()
        self.sleeper.watch(find_waker(avoid=self._backoff.left_out(now_s)).waker)
        at_the_top = (
            self._given is None
            and self._rank == 0
            and self.sleeper.waker is not None
            and not self._waker_fell
        )
        self._look_again_s = math.inf if at_the_top else now_s + _CLIMB_S

    def _climb(self) -> None:
        """Look whether a better rung than the one in use answers again."""
        if self._given_answers():
            return
        left_out = self._backoff.left_out(time.monotonic())
        found = discover(avoid=left_out, rungs=self._rank, processes=self._processes)
        if found.source is not None:
            self._take(found, found.source, "a better source answers")
        elif self.sleeper.waker is None or self._waker_fell:
            self._waker_fell = bool(self._backoff.left_out(time.monotonic()))  # else arm the best
            self._arm()
        else:
            self._look_again_s = time.monotonic() + _CLIMB_S

    def _given_answers(self) -> bool:
        """Whether the source that was given, and was lost, can be read again: it is taken then."""
        given, now_s = self._given, time.monotonic()
        if given is None or given.name in self._backoff.left_out(now_s):
            return False
        try:
            given.read()
        except SourceLostError:
            self._backoff.failed(given.name, now_s)
            return False
        self._box.close()
        self.source, self._look_again_s = given, math.inf
        self.sleeper.watch(None)
        self._bus.tell(SourceChanged(time_s=now_s, source=given.name, why="it answers again"))
        return True

    def _leave(self, why: str) -> None:
        """Look for another source than the one in use."""
        self._box.close()
        self.source = None
        self._find(why)

    def _waker_lost(self, why: str) -> None:
        """The source may be well all the same: it goes on being polled, and another waker is looked for."""
        self._backoff.failed(self.sleeper.lost_name, time.monotonic())
        self._waker_fell = True
        self._arm()
        waker = self.sleeper.waker
        now = "it is only polled now" if waker is None else f"{waker.name} wakes the loop now"
        self._bus.tell(SourceChanged(time_s=time.monotonic(), source=self.name, why=f"{why}: {now}"))


class _Box:
    """Holds the source that was found, for whoever closes it: the sensor, or its end."""

    def __init__(self) -> None:
        self.source: PressureSource | None = None

    def hold(self, source: PressureSource) -> None:
        self.close()
        self.source = source

    def close(self) -> None:
        source, self.source = self.source, None
        if source is not None:
            source.close()


class _Backoff:
    """Names of what failed lately. A rung that comes and goes is left out for longer each time."""

    def __init__(self) -> None:
        self._until_s: dict[str, tuple[float, float]] = {}  # until when, and for how long

    def failed(self, name: str, now_s: float) -> None:
        """Leave `name` out for a while from now."""
        until_s, length_s = self._until_s.get(name, (-math.inf, 0.0))
        again = now_s < until_s + max(length_s, _CLIMB_S)
        length_s = min(2 * length_s, _LONGEST_BACKOFF_S) if again else _BACKOFF_S
        self._until_s[name] = (now_s + length_s, length_s)

    def left_out(self, now_s: float) -> frozenset[str]:
        """What is to be left out now."""
        return frozenset(name for name, (until_s, _) in self._until_s.items() if now_s < until_s)
