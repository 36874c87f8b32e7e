"""The pressure source of a running machine: PSI and headroom in one reading."""

from __future__ import annotations

import time
from collections.abc import Callable

from psi_kv_governor.pressure.headroom import HeadroomReader
from psi_kv_governor.pressure.psi import PsiFile, Stall, StallMeter
from psi_kv_governor.pressure.reading import Reading

_NO_STALL = Stall(0.0, 0.0, 0.0)


class MachineSource:
    """Reads a PSI file and the headroom. Not thread safe: the governor has one thread for it.

    Without a PSI file (`psi` is None) the stall is 0 in every reading and only the headroom speaks.
    """

    def __init__(
        self,
        psi: PsiFile | None,
        headroom: HeadroomReader,
        name: str,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._psi = psi
        self._headroom = headroom
        self._name = name
        self._clock = clock
        self._meter = StallMeter()

    @property
    def name(self) -> str:
        """What is read, in words a user can follow up."""
        return self._name

    def read(self) -> Reading:
        """Take a reading now. Raises SourceLostError when the PSI file is gone.

        A limit that is gone is no failure: the headroom is then the next ancestor's, or the machine's.
        """
        if self._psi is None:
            time_s, stall = self._clock(), _NO_STALL
        else:
            totals = self._psi.read()
            time_s = self._clock()
            stall = self._meter.add(time_s, totals)
        room = self._headroom.read()
        return Reading(
            time_s=time_s,
            interval_s=stall.interval_s,
            some=stall.some,
            full=stall.full,
            headroom_bytes=None if room is None else room.headroom_bytes,
            limit_bytes=None if room is None else room.limit_bytes,
            source=self._name,
        )

    def close(self) -> None:
        """Give back the descriptor. Safe to call twice."""
        if self._psi is not None:
            self._psi.close()
