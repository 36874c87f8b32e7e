"""A machine whose pressure a test sets by hand."""

from __future__ import annotations

import time

from psi_kv_governor.errors import SourceLostError
from psi_kv_governor.pressure.reading import Reading, one_level


class FakeSource:
    """A PressureSource that says what `stall`, `headroom_bytes` and `limit_bytes` hold at the moment.

    Time is the machine's own, or moves by `tick_s` a reading: then nothing has to be waited for.
    """

    def __init__(self, stall: float = 0.0, tick_s: float | None = None) -> None:
        self.name = "a fake machine"
        self.stall = stall
        self.headroom_bytes: int | None = None
        self.limit_bytes: int | None = None
        self.lost = ""
        """Why the source no longer answers; '' while it does."""
        self.reads = 0
        self.closed = 0
        self._tick_s = tick_s

    def read(self) -> Reading:
        if self.lost:
            raise SourceLostError(self.lost)
        self.reads += 1
        return one_level(
            time_s=time.monotonic() if self._tick_s is None else self.reads * self._tick_s,
            interval_s=0.5,
            some=self.stall,
            full=self.stall,
            headroom_bytes=self.headroom_bytes,
            limit_bytes=self.limit_bytes,
            source=self.name,
        )

    def close(self) -> None:
        self.closed += 1
