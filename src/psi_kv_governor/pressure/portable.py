"""Available memory by psutil, for systems without /proc: macOS, Windows, the BSDs.

psutil is imported here alone, and only when this rung is tried: Linux needs none of it.
"""

from __future__ import annotations

from collections.abc import Mapping

from psi_kv_governor.errors import BadInputError
from psi_kv_governor.pressure.headroom import Headroom
from psi_kv_governor.pressure.reading import MACHINE, Level


class PortableRoom:
    """What can be taken without swapping, as psutil has it (`virtual_memory().available`).

    The meaning differs: MemAvailable on Linux, free and inactive pages on macOS, available physical memory on
    Windows. Raises BadInputError on creation where psutil is missing or can't tell.
    """

    def __init__(self) -> None:
        try:
            import psutil  # type: ignore[import-untyped,unused-ignore]
        except ImportError as error:
            raise BadInputError("psutil is not installed: pip install psutil") from error
        self._look = psutil.virtual_memory
        if self.read() is None:
            raise BadInputError("psutil can't tell the available memory of this system")

    def read(self) -> Headroom | None:
        """The room now; None while psutil can't tell."""
        try:
            memory = self._look()
            return Headroom(int(memory.available), int(memory.total), "psutil")
        except Exception:  # psutil raises what each system's own calls raise, RuntimeError among it
            return None

    def levels(self, own_mapped_bytes: int = 0) -> list[Level]:
        """The machine as the only level."""
        room = self.read()
        if room is None:
            return []
        return [
            Level(
                name=MACHINE,
                headroom_bytes=room.headroom_bytes,
                limit_bytes=room.limit_bytes,
                limit="available memory",
            )
        ]

    def steady(self, slack_bytes: Mapping[str, int]) -> bool:
        """See Room."""
        return False

    def close(self) -> None:
        """Nothing to give back."""
