"""The room under one limit, where it is going, and how it lies against the lines."""

from __future__ import annotations

import math
from typing import NamedTuple

from psi_kv_governor.config import GovernorConfig
from psi_kv_governor.pressure.reading import Level, Reading

REFAULTS_BYTES_PER_S = 4_000_000.0
"""Others' mapped file pages are no room any more when so much of what was dropped is read again: a thousand
pages a second, which at 0.1 ms each (an SSD) is the tenth of the time that `high` stands for."""


def line_bytes(config: GovernorConfig, limit_bytes: int) -> int:
    """Headroom under which memory is short: a share of the limit or an amount, whichever is less."""
    return min(math.ceil(config.headroom_low * limit_bytes), config.headroom_low_bytes)


def plenty_bytes(config: GovernorConfig, limit_bytes: int) -> int:
    """Headroom above which memory is plenty: a share of the limit or an amount, whichever is less."""
    return min(int(config.headroom_plenty * limit_bytes), config.headroom_plenty_bytes)


class Room(NamedTuple):
    """The headroom of a level, and where it is going."""

    headroom_bytes: int
    """With others' mapped file pages, as long as nobody misses them."""
    sure_bytes: int
    """Without them: what comes back must not drop them."""
    all_bytes: int
    """With them: when it is gone, somebody is killed."""
    limit_bytes: int
    line_bytes: int
    plenty_bytes: int
    fall_bytes_per_s: float
    fall_bytes: float
    """What falls in `lead_s` if it goes on as it does."""
    claimed_bytes: int
    """What neighbours that restore may still take of it."""
    told: bool
    """False where the line is finer than the kernel's count, and the limit was not met."""

    @property
    def short(self) -> bool:
        """Below the line, now or in `lead_s`."""
        return self.told and self.headroom_bytes - self.fall_bytes < self.line_bytes

    @property
    def going(self) -> bool:
        """Half of the line is gone or will be in `lead_s`, or is crossed by a fall that would take as much.

        One who takes memory at such a rate is not met by small steps. Others' mapped pages count: to drop
        them is slow for those who use them, and kills nobody.
        """
        half_bytes, ahead_bytes = self.line_bytes / 2, self.all_bytes - self.fall_bytes
        return self.told and (
            ahead_bytes < half_bytes or (ahead_bytes < self.line_bytes and self.fall_bytes >= half_bytes > 0)
        )

    @property
    def near(self) -> bool:
        """Within one and a half times the line: what has to be written before it can go is written now."""
        return self.told and self.headroom_bytes - self.fall_bytes < 1.5 * self.line_bytes

    @property
    def plenty(self) -> bool:
        return self.headroom_bytes > self.plenty_bytes

    @property
    def excess(self) -> float:
        """How far under the line it is or will be, 0 to 1."""
        under_bytes = self.line_bytes - self.headroom_bytes + self.fall_bytes
        return min(1.0, max(0.0, under_bytes) / self.line_bytes) if self.line_bytes and self.told else 0.0

    @property
    def missing_bytes(self) -> int:
        """What has to come back for it to be at its line in twice `lead_s`."""
        missing = self.line_bytes - self.headroom_bytes + 2 * self.fall_bytes
        return max(0, math.ceil(missing)) if self.told else 0

    @property
    def spare_bytes(self) -> int:
        """What may be filled: above the line, and nobody else's."""
        return max(0, self.sure_bytes - self.line_bytes - self.claimed_bytes)

    @property
    def figures(self) -> str:
        share = min(1.0, self.headroom_bytes / self.limit_bytes)
        if self.headroom_bytes < self.line_bytes:
            text = f"headroom {share:.1%} under {self.line_bytes / self.limit_bytes:.1%} of the limit"
        elif self.plenty:
            text = f"headroom {share:.0%} above {self.plenty_bytes / self.limit_bytes:.0%} of the limit"
        else:
            text = f"headroom {share:.1%} of the limit"
        if self.short and self.fall_bytes_per_s > 0.0:
            text += f", falling by {self.fall_bytes_per_s / 1e6:.0f} MB/s"
        return text


def room_of(
    config: GovernorConfig, reading: Reading, level: Level, fall_bytes_per_s: float, *, calm: bool
) -> Room | None:
    """The room of `level`; None where it has no limit. `calm`: its stall is below `low`."""
    if level.headroom_bytes is None or not level.limit_bytes:
        return None
    # Where the limit was not met, what is read again was dropped on account of another one.
    unmissed = calm and (level.refault_bytes_per_s < REFAULTS_BYTES_PER_S or level.bites is False)
    all_bytes = level.headroom_bytes + level.mapped_bytes
    line = line_bytes(config, level.limit_bytes)
    return Room(
        headroom_bytes=all_bytes if unmissed else level.headroom_bytes,
        sure_bytes=level.headroom_bytes,
        all_bytes=all_bytes,
        limit_bytes=level.limit_bytes,
        line_bytes=line,
        plenty_bytes=plenty_bytes(config, level.limit_bytes),
        fall_bytes_per_s=fall_bytes_per_s,
        fall_bytes=fall_bytes_per_s * config.lead_s,
        claimed_bytes=sum(one.claim_bytes for one in reading.neighbours if level.name in one.levels),
        told=line > level.grain_bytes or level.bites is not False,
    )


def spare_bytes(config: GovernorConfig, reading: Reading) -> int | None:
    """Least headroom above its line, of all levels; None where none is known."""
    rooms = (room_of(config, reading, level, 0.0, calm=True) for level in reading.levels)
    return min((room.spare_bytes for room in rooms if room is not None), default=None)
