"""Looks once, at the first parking, whether what is parked really leaves the machine's memory."""

from __future__ import annotations

from collections.abc import Callable

from psi_kv_governor.cache import Description, Result
from psi_kv_governor.residence.witness import held_bytes, memory_behind

_LEAST_BYTES = 1 << 20
"""The machine's counters tell less from nothing by chance."""
_LOOKS = 3
"""So many parkings are looked at: somebody may have freed as much at the moment of the first."""


class ParkingCheck:
    """What names don't tell (a loop device whose file is out of sight) the machine's counters do: memory that
    files hold rises by what was written.

    That alone may be somebody else's doing, so it is proved by writing before anything is stopped."""

    def __init__(self) -> None:
        self._left = _LOOKS
        self._before = 0

    def before(self) -> None:
        """A plan is about to be carried out."""
        if self._left:
            self._before = held_bytes()

    def after(self, result: Result, describe: Callable[[], Description]) -> str:
        """Why nothing is to be parked any more; '' where all is well. The engine is asked to `describe`
        itself only where this parking is looked at."""
        n_bytes = max(result.written_bytes, result.bytes_returned)
        if not self._left or n_bytes < _LEAST_BYTES or not (description := describe()).place:
            return ""
        first = self._left == _LOOKS
        self._left -= 1
        rose = held_bytes() - self._before >= n_bytes // 2
        # What was born in a file may have been written long before it is dropped.
        if rose or (first and description.backing == "file"):
            why = memory_behind(description.place)
            if why:
                self._left = 0
                return f"nothing is parked any more: {description.place} is memory ({why})"
        return ""
