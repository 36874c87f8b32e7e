"""A source of pressure of one's own: an orchestrator says "free total", in bytes, in a file.

    python examples/own_source.py FILE

It is given to a governor (`Governor(engine, source=FreeBytes(path))`, `GovernedLlama(..., source=...)`).
"""

import sys
import time
from pathlib import Path

from psi_kv_governor import SourceLostError
from psi_kv_governor.pressure import Reading, one_level


def tell_free_bytes(path: Path, free_bytes: int, total_bytes: int) -> None:
    """What the orchestrator does: a whole new file, as one that is written over is empty for a moment."""
    new = path.with_suffix(".new")
    new.write_text(f"{free_bytes} {total_bytes}")
    new.replace(path)


class FreeBytes:
    """Headroom by a file; it tells no stall, so falling headroom alone decides."""

    def __init__(self, path: Path) -> None:
        self.name = f"free bytes in {path}"
        self._path, self._last_s = path, time.monotonic()

    def read(self) -> Reading:
        """A reading of now. The governor looks for another source where this one is lost."""
        try:
            free, total = map(int, self._path.read_text().split())
        except (OSError, ValueError) as error:
            raise SourceLostError(f"{self._path} can't be read: {error}") from error
        before_s, self._last_s = self._last_s, time.monotonic()
        return one_level(
            time_s=self._last_s,
            interval_s=self._last_s - before_s,
            headroom_bytes=free,
            limit_bytes=total,
            source=self.name,
        )

    def close(self) -> None:
        """Nothing is open."""


if __name__ == "__main__":
    reading = FreeBytes(Path(sys.argv[1])).read()
    assert reading.headroom_bytes is not None
    assert reading.limit_bytes is not None
    print(f"{reading.headroom_bytes >> 20} of {reading.limit_bytes >> 20} MiB are free")
