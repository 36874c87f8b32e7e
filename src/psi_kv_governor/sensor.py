"""The source that is read now, and the search for another when it is gone."""

from __future__ import annotations

import math
import time
import weakref

from psi_kv_governor.bus import Bus
from psi_kv_governor.errors import SourceLostError
from psi_kv_governor.events import SourceChanged
from psi_kv_governor.pressure import discover
from psi_kv_governor.pressure.reading import PressureSource, Reading

# Where no source is left, or one is lost again so soon, how long until the next search.
_REDISCOVER_S = 10.0


class Sensor:
    """Reads `source`, or the best source of this machine. A source that was given is not closed here."""

    def __init__(self, source: PressureSource | None, bus: Bus) -> None:
        self.source = source
        self._bus = bus
        self._found: PressureSource | None = None
        self._found_s = -math.inf
        self._look_again_s = 0.0
        if source is None:
            self._find("at start")

    @property
    def name(self) -> str:
        """What is read, in words."""
        return self.source.name if self.source else "none"

    def read(self) -> Reading | None:
        """A reading now; None where there is nothing to read, or the source was lost just now."""
        if self.source is None and time.monotonic() >= self._look_again_s:
            self._find("looked again")
        if self.source is None:
            return None
        try:
            return self.source.read()
        except SourceLostError as error:
            self.close()
            self._lost(str(error))
            return None

    def _lost(self, why: str) -> None:
        self.source = None
        if time.monotonic() - self._found_s < _REDISCOVER_S:
            self._look_again_s = time.monotonic() + _REDISCOVER_S
            self._bus.degrade("sensing", f"{why}, and it had only just been found")
        else:
            self._find(why)

    def _find(self, why: str) -> None:
        found = discover().source
        if found is None:
            self._look_again_s = time.monotonic() + _REDISCOVER_S
            self._bus.degrade("sensing", "no source of memory pressure here (see `psi-kv doctor`)")
            return
        self.source = self._found = found
        self._found_s = time.monotonic()
        weakref.finalize(self, found.close)  # also when the governor is only dropped
        self._bus.tell(SourceChanged(time_s=self._found_s, source=found.name, why=why))

    def close(self) -> None:
        """Give back the source that was found here. Safe to call twice."""
        if self._found is not None:
            self._found.close()
