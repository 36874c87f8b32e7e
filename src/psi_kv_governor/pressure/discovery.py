"""Which pressure source this machine has, and why not the others: the lower half of the ladder.

The upper half, what wakes the loop beside it, is in `waking`.
"""

from __future__ import annotations

import errno
import os
import stat
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from psi_kv_governor.errors import BadInputError
from psi_kv_governor.kernel.mountinfo import mounts
from psi_kv_governor.pressure.cgroup import Membership, OwnCgroups, find_cgroups
from psi_kv_governor.pressure.headroom import HeadroomReader
from psi_kv_governor.pressure.limit_events import LimitEvents, events_of
from psi_kv_governor.pressure.machine import Counters, MachineSource
from psi_kv_governor.pressure.portable import PortableRoom
from psi_kv_governor.pressure.processes import Processes, only_this
from psi_kv_governor.pressure.psi import PsiFile
from psi_kv_governor.pressure.reading import MACHINE, PressureSource
from psi_kv_governor.pressure.systemd import WATCH, is_off, parse_watch


class Candidate(NamedTuple):
    """One rung that was looked at."""

    name: str
    usable: bool
    why: str
    """What it gives where it is usable; else why not, and what to do about it."""
    stall: bool = False
    """Whether it tells the stall itself, and no estimate of it."""


class Discovery(NamedTuple):
    """The best source there is, and every candidate in order of preference."""

    source: PressureSource | None
    """Open and ready; the caller closes it. None where the machine tells nothing at all."""
    considered: list[Candidate]
    rank: int = 0
    """Place of the source among `considered`; those before it may come back."""
    off: str = ""
    """Why pressure is not to be handled although it could be; empty when nobody said so."""


class _Machine(NamedTuple):
    """What every rung looks at."""

    root: Path
    environ: Mapping[str, str]
    cgroups: OwnCgroups
    headroom: HeadroomReader
    membership: Membership
    processes: Processes


_Rung = Callable[[_Machine], tuple[Candidate, PressureSource | None]]

_TURNED_OFF = f"{WATCH}=/dev/null turns memory pressure handling off: the cache is trimmed by hand only"


def discover(
    root: Path = Path("/"),
    environ: Mapping[str, str] | None = None,
    *,
    avoid: frozenset[str] = frozenset(),
    rungs: int | None = None,
    processes: Processes = only_this,
) -> Discovery:
    """Try the rungs of the ladder in order; the first usable one whose name is not in `avoid` is the source.

    `root` stands in for the folder that holds /proc and /sys, `environ` for the process's environment. Only
    the first `rungs` are tried where it is given. `processes` gives the ids of those that hold the caches.
    """
    environ = os.environ if environ is None else environ
    if is_off(environ):
        return Discovery(
            None, [Candidate(WATCH, False, f"{_TURNED_OFF} (MemoryPressureWatch=)")], off=_TURNED_OFF
        )
    cgroups = find_cgroups(root)
    machine = _Machine(
        root,
        environ,
        cgroups,
        HeadroomReader(cgroups, root, environ=environ),
        Membership(root),
        processes,
    )
    chosen: PressureSource | None = None
    rank = 0
    considered = []
    ladder = LADDER
    if sys.platform != "linux":
        considered.append(Candidate("PSI and cgroups", False, "only Linux has them"))
        ladder = (_portable,)
    for rung in ladder[:rungs]:
        candidate, source = rung(machine)
        considered.append(candidate)
        if source is None:
            continue
        if chosen is None and source.name not in avoid:
            chosen, rank = source, len(considered) - 1
        else:
            source.close()
    if chosen is None:
        machine.headroom.close()
        machine.membership.close()
    return Discovery(chosen, considered, rank)


def _of_systemd(machine: _Machine) -> tuple[Candidate, PressureSource | None]:
    """The PSI file that the service manager names. A FIFO or socket tells of no amount: it only wakes."""
    try:
        watch = parse_watch(machine.environ)
    except BadInputError as error:
        return Candidate(WATCH, False, f"{error}: correct the unit, or unset it"), None
    if watch is None:
        return Candidate(WATCH, False, "not set: no service manager asks for anything"), None
    name = f"{WATCH}={watch.path}"
    try:
        if not stat.S_ISREG(watch.path.stat().st_mode):
            return Candidate(name, False, "no PSI file, which would say how much"), None
    except OSError as error:
        return Candidate(name, False, f"it cannot be used: {error.strerror}"), None
    gives = "stall of what the service manager names, and headroom"
    return _psi_rung(machine, watch.path, gives, str(watch.path.parent))


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
    return _psi_rung(machine, path, "stall of the own cgroup, and headroom", str(own.folder), own.folder)


def _whole_machine(machine: _Machine) -> tuple[Candidate, PressureSource | None]:
    """/proc/pressure/memory: the whole host's stall, also inside most containers."""
    path = machine.root / "proc/pressure/memory"
    return _psi_rung(machine, path, "stall of the whole machine, and headroom", MACHINE)


def _limit_events(machine: _Machine) -> tuple[Candidate, PressureSource | None]:
    """No PSI, but a cgroup that counts how often its limit was met."""
    path = events_of(machine.cgroups)
    if path is None:
        return Candidate("memory.events of the own cgroup", False, why_no_limits(machine.cgroups)), None
    try:
        events = LimitEvents(path)
    except (OSError, BadInputError) as error:
        why = error.strerror if isinstance(error, OSError) else str(error)
        return Candidate(str(path), False, f"it cannot be read: {why}"), None
    why = "how often the cgroup met its limit, as an estimate of stall, and headroom"
    return Candidate(str(path), True, why), _source(machine, events, str(path), str(path.parent))


def why_no_limits(cgroups: OwnCgroups) -> str:
    """Why no cgroup counts how often its limit was met, and what to do about it."""
    own = cgroups.unified
    if own is None:
        return "no cgroup v2 is mounted here"
    if own.is_root:
        return (
            "the cgroup to be seen here is the root, which has no limit: "
            "start the process in a cgroup, e.g. with systemd-run --scope"
        )
    try:
        controllers = (own.mount / "cgroup.controllers").read_text().split()
    except OSError:
        controllers = []
    if "memory" not in controllers:
        return "no memory controller here: boot with cgroup_enable=memory (a Raspberry Pi), or it is on v1"
    return "the memory controller is not on for this cgroup: write +memory to cgroup.subtree_control above it"


def _headroom_only(machine: _Machine) -> tuple[Candidate, PressureSource | None]:
    """No PSI and no cgroup: how near the limit is, and nothing else."""
    room = machine.headroom.read()
    if room is None:
        why = "neither a cgroup limit nor MemAvailable can be read: mount /proc"
        return Candidate("headroom alone", False, why), None
    why = f"room below the limit of {room.source}; the stall is not known and reads as 0"
    name = f"headroom alone ({room.source})"
    return Candidate(name, True, why), _source(machine, None, name)


def _portable(machine: _Machine) -> tuple[Candidate, PressureSource | None]:
    """What psutil tells, where there is no /proc (macOS, Windows, BSD)."""
    if machine.headroom.read() is not None:  # its import would cost 20 ms and some MB
        return Candidate("psutil", False, "not needed: /proc tells"), None
    try:
        room = PortableRoom()
    except BadInputError as error:
        return Candidate("psutil", False, str(error)), None
    why = "available memory of the machine; the stall is not known and reads as 0"
    return Candidate("headroom alone (psutil)", True, why), MachineSource(
        None, room, "headroom alone (psutil)"
    )


LADDER: tuple[_Rung, ...] = (
    _of_systemd,
    _own_cgroup,
    _whole_machine,
    _limit_events,
    _headroom_only,
    _portable,
)
"""Candidates, the best first. A new source is one function more, in its place."""


def _psi_rung(
    machine: _Machine, path: Path, gives: str, level: str, cgroup: Path | None = None
) -> tuple[Candidate, PressureSource | None]:
    try:
        psi = PsiFile(path)
    except OSError as error:
        return Candidate(str(path), False, why_no_psi(error, machine.root, cgroup)), None
    except BadInputError as error:
        return Candidate(str(path), False, str(error)), None
    return Candidate(str(path), True, gives, stall=True), _source(machine, psi, str(path), level)


def _source(machine: _Machine, counters: Counters | None, name: str, level: str = "") -> PressureSource:
    others = {MACHINE: machine.root / "proc/pressure/memory"}
    own = machine.cgroups.unified
    if own is not None and not own.is_root:
        others |= {str(folder): folder / "memory.pressure" for folder in own.lineage}
    return MachineSource(
        counters,
        machine.headroom,
        name,
        membership=machine.membership,
        level=level,
        others=others,
        processes=machine.processes,
    )


def why_no_psi(error: OSError, root: Path, cgroup: Path | None) -> str:
    """Why a PSI file (of the folder `cgroup`) can't be used, and what to do about it."""
    if error.errno in (errno.ENOENT, errno.EOPNOTSUPP):
        if cgroup is not None and _switched_off(cgroup):
            return f"PSI is switched off for this cgroup: write 1 to {cgroup / 'cgroup.pressure'}"
        if error.errno == errno.ENOENT and cgroup is None and (hidden := why_hidden(root)):
            return hidden
        return "this kernel keeps no PSI: boot with psi=1 on its command line (Linux 4.20 or later)"
    if error.errno in (errno.EACCES, errno.EPERM):
        return f"{error.strerror}: give this user the right to it"
    return f"it cannot be used: {error.strerror}"


def why_hidden(root: Path) -> str:
    """Why /proc/pressure can't be seen although the kernel may keep PSI; '' where nothing hides it."""
    if (root / "proc/pressure").is_dir():
        return ""
    procs = [mount for mount in mounts(root / "proc") if mount.fs_type == "proc"]
    if any(mount.details.get("subset") == "pid" for mount in procs):
        return "/proc is mounted with subset=pid, which hides it: take ProcSubset=pid out of the unit"
    if any(_psi_of(folder) for folder in find_cgroups(root).unified_lineage):
        return "something hides /proc/pressure, though this kernel keeps PSI: mount the whole /proc"
    return ""


def _psi_of(folder: Path) -> bool:
    return (folder / "memory.pressure").exists()


def _switched_off(cgroup: Path) -> bool:
    """`cgroup.pressure` (Linux 6.1) is 0 where PSI was turned off for one cgroup."""
    try:
        return (cgroup / "cgroup.pressure").read_text().strip() == "0"
    except OSError:
        return False
