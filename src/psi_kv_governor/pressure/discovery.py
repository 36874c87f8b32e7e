"""Which pressure source this machine has, and why not the others."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from psi_kv_governor.errors import BadInputError
from psi_kv_governor.pressure.cgroup import Cgroup, OwnCgroups, find_cgroups
from psi_kv_governor.pressure.headroom import HeadroomReader
from psi_kv_governor.pressure.machine import MachineSource
from psi_kv_governor.pressure.psi import PsiFile
from psi_kv_governor.pressure.reading import PressureSource


class Candidate(NamedTuple):
    """One source that was looked at."""

    name: str
    usable: bool
    why: str
    """What it gives where it is usable; else why not, and what to do about it."""


class Discovery(NamedTuple):
    """The best source there is, and every candidate in order of preference."""

    source: PressureSource | None
    """Open and ready; the caller closes it. None where the machine tells nothing at all."""
    considered: list[Candidate]


class _Machine(NamedTuple):
    """What every rung looks at."""

    root: Path
    cgroups: OwnCgroups
    headroom: HeadroomReader


_Rung = Callable[[_Machine], tuple[Candidate, PressureSource | None]]


def discover(root: Path = Path("/")) -> Discovery:
    """Try the rungs of the ladder in order; the first usable one is the source.

    `root` stands in for the folder that holds /proc and /sys.
    """
    cgroups = find_cgroups(root)
    machine = _Machine(root, cgroups, HeadroomReader(cgroups, root))
    chosen: PressureSource | None = None
    considered = []
    for rung in LADDER:
        candidate, source = rung(machine)
        considered.append(candidate)
        if chosen is None:
            chosen = source
        elif source is not None:
            source.close()
    return Discovery(chosen, considered)


def _own_cgroup(machine: _Machine) -> tuple[Candidate, PressureSource | None]:
    """`memory.pressure` of the own v2 cgroup: what one's own tasks suffer."""
    own = machine.cgroups.unified
    if own is None:
        why = "no cgroup v2 is mounted here: boot with systemd.unified_cgroup_hierarchy=1"
        return Candidate("memory.pressure of the own cgroup", False, why), None
    path = own.folder / "memory.pressure"
    if own.is_root:
        why = (
            "the cgroup to be seen here is the root, whose pressure is the whole machine's: "
            "to be told its own, start the process in a cgroup, e.g. with systemd-run --scope"
        )
        return Candidate(str(path), False, why), None
    return _psi_rung(machine, path, "stall of the own cgroup, and headroom", own)


def _whole_machine(machine: _Machine) -> tuple[Candidate, PressureSource | None]:
    """/proc/pressure/memory: the whole host's stall, also inside most containers."""
    path = machine.root / "proc/pressure/memory"
    return _psi_rung(machine, path, "stall of the whole machine, and headroom")


def _headroom_only(machine: _Machine) -> tuple[Candidate, PressureSource | None]:
    """No PSI: how near the limit is, and nothing else."""
    room = machine.headroom.read()
    if room is None:
        why = "neither a cgroup limit nor MemAvailable can be read: mount /proc"
        return Candidate("headroom alone", False, why), None
    why = f"room below the limit of {room.source}; the stall is not known and reads as 0"
    name = f"headroom alone ({room.source})"
    return Candidate(name, True, why), MachineSource(None, machine.headroom, name)


LADDER: tuple[_Rung, ...] = (_own_cgroup, _whole_machine, _headroom_only)
"""Candidates, the best first. A new source is one function more, in its place."""


def _psi_rung(
    machine: _Machine, path: Path, gives: str, own: Cgroup | None = None
) -> tuple[Candidate, PressureSource | None]:
    try:
        psi = PsiFile(path)
    except OSError as error:
        return Candidate(str(path), False, _why_not(error, own)), None
    except BadInputError as error:
        return Candidate(str(path), False, str(error)), None
    return Candidate(str(path), True, gives), MachineSource(psi, machine.headroom, str(path))


def _why_not(error: OSError, own: Cgroup | None) -> str:
    if error.errno in (errno.ENOENT, errno.EOPNOTSUPP):
        if own is not None and _switched_off(own):
            return f"PSI is switched off for this cgroup: write 1 to {own.folder / 'cgroup.pressure'}"
        return "this kernel keeps no PSI: boot with psi=1 on its command line (Linux 4.20 or later)"
    if error.errno in (errno.EACCES, errno.EPERM):
        return f"{error.strerror}: let this user read it"
    return f"it cannot be read: {error.strerror}"


def _switched_off(own: Cgroup) -> bool:
    """`cgroup.pressure` (Linux 6.1) is 0 where PSI was turned off for one cgroup."""
    try:
        return (own.folder / "cgroup.pressure").read_text().strip() == "0"
    except OSError:
        return False
