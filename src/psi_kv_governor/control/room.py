"""The room under one limit, where it is going, and how it lies against the lines."""

from __future__ import annotations

import math

import msgspec

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


class Room(msgspec.Struct, frozen=True, kw_only=True):
    """The headroom of a level, and where it is going."""

    headroom_bytes: int
    """With others' mapped file pages, as long as nobody misses them."""
    limit_bytes: int
    line_bytes: int
    plenty_bytes: int
    fall_bytes_per_s: float
    spare_bytes: int
    """What may be filled: above the line, and nobody else's. What comes back must not drop mapped pages."""
    missing_bytes: int
    """What has to come back for it to be at its line in twice `lead_s`."""
    excess: float
    """How far under the line it is or will be, 0 to 1."""
    plenty: bool
    short: bool
    """Below the line, now or in `lead_s`."""
    near: bool
    """Within one and a half times the line: what has to be written before it can go is written now."""
    going: bool
    """Half of the line is gone or will be in `lead_s`, or is crossed by a fall that would take as much.

    One who takes memory at such a rate is not met by small steps. Others' mapped pages count: to drop
    them is slow for those who use them, and kills nobody.
    """

    @property
    def figures(self) -> str:
        """In words."""
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
    sure_bytes, limit_bytes = level.headroom_bytes, level.limit_bytes
    if sure_bytes is None or not limit_bytes:
        return None
    # Where the limit was not met, what is read again was dropped on account of another one.
    unmissed = calm and (level.refault_bytes_per_s < REFAULTS_BYTES_PER_S or level.bites is False)
    all_bytes = sure_bytes + level.mapped_bytes
    headroom = all_bytes if unmissed else sure_bytes
    line, plenty = line_bytes(config, limit_bytes), plenty_bytes(config, limit_bytes)
    fall = fall_bytes_per_s * config.lead_s  # if it goes on as it does
    left, left_of_all, under = headroom - fall, all_bytes - fall, line - headroom
    # Not where the line is finer than the kernel's count, and the limit was not met.
    told = line > level.grain_bytes or level.bites is not False
    going = left_of_all < line / 2 or (left_of_all < line and fall >= line / 2 > 0)
    return Room(
        headroom_bytes=headroom,
        limit_bytes=limit_bytes,
        line_bytes=line,
        plenty_bytes=plenty,
        fall_bytes_per_s=fall_bytes_per_s,
        spare_bytes=_spare_bytes(reading, level, sure_bytes - line),
        missing_bytes=math.ceil(under + 2 * fall) if told and under + 2 * fall > 0 else 0,
        excess=min(1.0, (under + fall) / line) if line and told and under + fall > 0 else 0.0,
        plenty=headroom > plenty,
        short=told and left < line,
        near=told and left < 1.5 * line,
        going=told and going,
    )


def _spare_bytes(reading: Reading, level: Level, over_bytes: int) -> int:
    """Of what `level` has over its line, what no neighbour that restores may still take."""
    for one in reading.neighbours:
        if one.claim_bytes and level.name in one.levels:
            over_bytes -= one.claim_bytes
    return max(0, over_bytes)


def spare_bytes(config: GovernorConfig, reading: Reading) -> int | None:
    """Least headroom above its line, of all levels; None where none is known."""
    spares = [
        _spare_bytes(reading, level, level.headroom_bytes - line_bytes(config, level.limit_bytes))
        for level in reading.levels
        if level.headroom_bytes is not None and level.limit_bytes
    ]
    return min(spares, default=None)
