"""What `psi-kv doctor` finds, and how an engine has it look at what that engine needs."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol

from psi_kv_governor.config import GovernorConfig
from psi_kv_governor.entry_points import named

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

ENTRY_POINTS = "psi_kv_governor.checks"
"""Group under which a package names an engine's checks: `name = "package.module"`, see `EngineChecks`."""

State = Literal["ok", "warn", "fail"]


@dataclass(frozen=True)
class Check:
    """What was found about one thing."""

    name: str
    state: State
    """`ok`; `warn`: the governor works here, with less; `fail`: it can't do its work."""
    detail: str
    remedy: str = ""
    """What to do; empty when all is well."""
    more: tuple[str, ...] = ()
    """Further lines, where one does not tell it all."""


class Look(NamedTuple):
    """One look at one thing, which may end the process that takes it."""

    name: str
    take: Callable[[], Iterable[Check]]
    without: State = "fail"
    """What it comes to where it can't be taken."""


class EngineChecks(Protocol):
    """A module with what an engine needs looked at."""

    def in_use(self) -> bool:
        """Whether its libraries are loaded here: a forked child has their locks, as they were held, without
        the threads that would give them up."""

    def looks(self, config: GovernorConfig, model: Path | None) -> Generator[Look, list[Check], None]:
        """The looks in their order. Each is sent what it found; `model` None is the demo model."""


def engine_checks() -> Mapping[str, EntryPoint]:
    """Of every engine that has some, by its name. None is imported."""
    return named(ENTRY_POINTS)
