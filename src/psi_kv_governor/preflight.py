"""Looks at one thing after the other that the governor needs, and says what to do where it is missing.

Each check is a function that gives `Check`s and raises nothing; `root` stands in for the folder that holds
/proc and /sys.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from psi_kv_governor.amounts import mib
from psi_kv_governor.checks import Check
from psi_kv_governor.config import GovernorConfig
from psi_kv_governor.errors import BadInputError
from psi_kv_governor.pressure.cgroup import find_cgroups
from psi_kv_governor.pressure.discovery import Candidate, discover, why_no_limits
from psi_kv_governor.pressure.headroom import HeadroomReader
from psi_kv_governor.pressure.kernel_file import KernelFile
from psi_kv_governor.pressure.kill_lines import find_kill_lines
from psi_kv_governor.pressure.reading import MACHINE
from psi_kv_governor.pressure.systemd import WATCH
from psi_kv_governor.pressure.waking import find_waker
from psi_kv_governor.residence import NO_PLACE, choose_backing, find_place, swap_state
from psi_kv_governor.sandbox.sandbox import Sandbox

_COMMIT = re.compile(rb"^(CommitLimit|Committed_AS):\s+(\d{1,20}) kB\n", re.MULTILINE)
_CAPABILITIES = re.compile(r"^CapEff:\s*([0-9a-f]{1,16})$", re.MULTILINE)
_NUMBER = re.compile(r"[0-9]{1,18}")
_CAP_SYS_RESOURCE = 24  # <linux/capability.h>


def check_pressure(root: Path = Path("/")) -> Check:
    """Where stall and headroom are read, and what wakes the loop: each rung of the ladder, a line each."""
    found, waking = discover(root), find_waker(root)
    for opened in (found.source, waking.waker):
        if opened is not None:
            opened.close()
    ladder = (*_rungs(waking.considered, "wakes"), *_rungs(found.considered, "read"))
    if found.off:
        remedy = "take MemoryPressureWatch=off out of the unit to have it govern by itself"
        return Check("pressure", "warn", found.off, remedy, ladder)
    if found.source is None:
        return Check(
            "pressure",
            "fail",
            "neither stall nor headroom can be read",
            "mount /proc, or pip install psutil",
            ladder,
        )
    chosen = found.considered[found.rank]
    detail = f"{chosen.name}: {chosen.why}"
    detail += f"; {waking.waker.name} wakes the loop" if waking.waker is not None else "; polled only"
    if chosen.stall:
        return Check("pressure", "ok", detail, more=ladder)
    return Check("pressure", "warn", detail, _how_to_get_psi(found.considered[: found.rank]), ladder)


def _rungs(considered: list[Candidate], does: str) -> Iterator[str]:
    """A line for each: the first that is usable is the one in use."""
    used = False
    for candidate in considered:
        sign = "no" if not candidate.usable else "spare" if used else does
        used = used or candidate.usable
        yield f"{sign:<6}{candidate.name}: {candidate.why}"


def _how_to_get_psi(better: list[Candidate]) -> str:
    """The remedies for the rungs that would have told the stall."""
    return "; ".join(dict.fromkeys(candidate.why for candidate in better if candidate.name != WATCH))


def check_cgroup(root: Path = Path("/")) -> Check:
    """Which memory cgroup this process is in, and every limit above it: each is judged by itself."""
    cgroups = find_cgroups(root)
    own = cgroups.memory_v1 or cgroups.unified
    reader = HeadroomReader(cgroups, root, environ={})
    limits = [level for level in reader.levels() if level.name == MACHINE or level.name.startswith("/")]
    reader.close()
    if own is None or not limits:
        why = "no cgroup is to be seen: only the machine's own memory counts"
        return Check("cgroup", "warn", why, "mount cgroup2 at /sys/fs/cgroup, or start it under systemd")
    told = [
        f"{mib(one.headroom_bytes or 0, 0)} free of {mib(one.limit_bytes or 0, 0)}, {one.limit} of {one.name}"
        for one in limits
    ]
    none = (
        "" if len(limits) > 1 else f"; {why_no_limits(cgroups)}" if own.is_root else "; no limit of its own"
    )
    return Check("cgroup", "ok", f"v{own.version} {own.folder}{none}; {told[0]}", more=tuple(told[1:]))


def check_lines(root: Path = Path("/"), environ: Mapping[str, str] | None = None) -> Check:
    """Programs that kill or evict before the kernel would."""
    found = find_kill_lines(root, os.environ if environ is None else environ)
    if not found:
        return Check("other killers", "ok", "none is to be seen: it is the kernel that kills")
    told = "; ".join(line.about for line in found)
    return Check("other killers", "ok", f"{told}: headroom is counted down to that line as well")


def check_overcommit(root: Path = Path("/")) -> Check:
    """Strict overcommit refuses memory that is free."""
    mode = KernelFile(root / "proc/sys/vm/overcommit_memory")
    meminfo = KernelFile(root / "proc/meminfo")
    strict, text = mode.number() == 2, meminfo.read() or b""
    mode.close()
    meminfo.close()
    if not strict:
        return Check("overcommit", "ok", "not strict: memory is promised as it is asked for")
    values = {name: int(number) * 1024 for name, number in _COMMIT.findall(text)}
    limit, committed = values.get(b"CommitLimit", 0), values.get(b"Committed_AS", 0)
    return Check(
        "overcommit",
        "warn",
        f"strict: of {mib(limit, 0)} that may be promised {mib(committed, 0)} are, and what is parked stays "
        "promised; an allocation beyond that fails however much is free",
        "sysctl vm.overcommit_memory=0, or a higher vm.overcommit_ratio",
    )


def check_swap(root: Path = Path("/")) -> Check:
    """Whether there is swap: without it a process is killed before a stall shows."""
    try:
        lines = (root / "proc/swaps").read_text(errors="replace").splitlines()[1:]
    except OSError:
        lines = []
    devices = [words for words in map(str.split, lines) if len(words) >= 4 and _NUMBER.fullmatch(words[2])]
    if not devices:
        return Check(
            "swap",
            "warn",
            "none: memory runs out without a stall before, and only headroom tells",
            "add compressed swap, for instance `apt install zram-tools` or systemd-zram-generator",
        )
    named = (f"{words[0]} ({mib(int(words[2]) * 1024, 0)})" for words in devices)
    return Check("swap", "ok", ", ".join(named))


def check_privileges(root: Path = Path("/")) -> Check:
    """What this user may do. The governor itself needs nothing; `demo` and `bench` want a cgroup."""
    user = os.geteuid() if hasattr(os, "geteuid") else None  # Windows has no such number
    who = "root" if user == 0 else "this user" if user is None else f"user {user}"
    triggers = "" if _may(_CAP_SYS_RESOURCE, root) else ", no CAP_SYS_RESOURCE (PSI windows are whole 2 s)"
    able, why = Sandbox.available()
    if able:
        return Check("privileges", "ok", f"{who}, may make memory cgroups{triggers}")
    return Check(
        "privileges", "warn", f"{who}: `demo` and `bench` have no cgroup of their own{triggers}", why
    )


def _may(capability: int, root: Path) -> bool:
    try:
        status = (root / "proc/self/status").read_text(errors="replace")
    except OSError:
        return False
    effective = _CAPABILITIES.search(status)
    return effective is not None and bool(int(effective[1], 16) >> capability & 1)


def check_place(config: GovernorConfig) -> Check:
    """Where parked bytes go, how much fits, how fast it is, and whether caches are born there."""
    try:
        search = find_place(
            config.place, limit_bytes=config.place_limit_bytes, reserve_bytes=config.place_reserve_bytes
        )
    except BadInputError as error:
        return Check("place to park", "fail", "the folder can't be used", str(error))
    place = search.place
    more = tuple(f"refused: {one.folder}: {one.why}" for one in search.refused)
    if place is None:
        if config.place == NO_PLACE:
            return Check("place to park", "ok", "none, as was asked: what is given up of a context is gone")
        return Check("place to park", "fail", "none: nothing can be parked", search.why_none, more)
    backing, why = choose_backing(config.backing, place, *swap_state())
    speed = place.write_bytes_per_s / 1e6
    detail = f"{place.folder} ({place.device}): {mib(place.free_bytes, 0)} of room, {speed:,.0f} MB/s"
    return Check("place to park", "ok", f"{detail}; caches are born in {backing}: {why}", more=more)
