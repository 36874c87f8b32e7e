"""What the scheduler's side and the workers say to each other with each step: plain data, pickled by vLLM."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from psi_kv_governor.pressure.reading import Reading


class Kind(str, Enum):
    """What is to be done with blocks."""

    PARK = "park"
    """They leave memory, and read as before."""
    RELEASE = "release"
    """Nobody needs their content any more."""
    WRITE = "write"
    """What of them is dirty is written; they stay."""
    BACK = "back"
    """They are read into memory."""


@dataclass(frozen=True)
class Order:
    """One thing to do on every rank."""

    number: int
    kind: Kind
    blocks: tuple[int, ...]


@dataclass(frozen=True)
class Step:
    """From the scheduler to the workers, once a step."""

    used: tuple[int, ...] = ()
    """Blocks that a request uses from this step on: whatever was ordered for them before is off."""
    blank: tuple[int, ...] = ()
    """Of these the parked ones that are written anew: the first write would read what they held."""
    orders: tuple[Order, ...] = ()
    idle: bool = False
    """No forward pass waits for the end of the work."""
    look: bool = False
    """A reading of the host, and the bytes in memory, are wanted."""


@dataclass(frozen=True)
class Finished:
    """What became of an order on one rank, or on all of them together."""

    bytes_returned: int = 0
    bytes_back: int = 0
    written_bytes: int = 0
    problem: str = ""
    ranks: int = 1

    def __add__(self, other: Finished) -> Finished:
        return Finished(
            self.bytes_returned + other.bytes_returned,
            self.bytes_back + other.bytes_back,
            self.written_bytes + other.written_bytes,
            self.problem or other.problem,
            self.ranks + other.ranks,
        )


@dataclass(frozen=True)
class About:
    """How one rank stands."""

    host: str
    pid: int
    block_bytes: int
    """Of its part of one block."""
    backing: str = "memory"
    place: str = ""
    why_not: str = ""
    """Why nothing of it can be parked; '' where it can."""
    resident_bytes: int = 0
    stored_bytes: int = 0
    dirty_bytes: int = 0
    reading: Reading | None = None


@dataclass
class Report:
    """From the workers to the scheduler, once a step: merged over ranks."""

    finished: dict[int, Finished] = field(default_factory=dict)
    """By the number of the order."""
    about: dict[int, About] = field(default_factory=dict)
    """By rank; of those that were asked, or that are new."""

    def merged(self, other: Report) -> Report:
        """Two reports as one."""
        finished = dict(self.finished)
        for number, one in other.finished.items():
            finished[number] = finished[number] + one if number in finished else one
        return Report(finished, {**self.about, **other.about})
