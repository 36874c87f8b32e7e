"""Which waker this machine has, and why not the others: the upper half of the ladder."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from psi_kv_governor.errors import BadInputError
from psi_kv_governor.pressure.cgroup import find_cgroups
from psi_kv_governor.pressure.discovery import Candidate, why_no_psi
from psi_kv_governor.pressure.systemd import WATCH, open_watch, parse_watch
from psi_kv_governor.pressure.waker import Waker, arm


class Waking(NamedTuple):
    """The best waker there is, and every candidate in order of preference."""

    waker: Waker | None
    """Armed; the caller closes it. None where the loop only polls."""
    considered: list[Candidate]


class _Place(NamedTuple):
    """One thing that could wake the loop."""

    name: str
    open: Callable[[], Waker] | None
    """None where there is nothing to open."""
    why: str
    """What it gives; without `open`, why there is nothing."""
    cgroup: Path | None = None


def find_waker(
    root: Path = Path("/"), environ: Mapping[str, str] | None = None, *, avoid: frozenset[str] = frozenset()
) -> Waking:
    """Try the wakers in order and arm the first that can be had; one in `avoid` failed just now.

    `root` stands in for the folder that holds /proc and /sys. Only one is armed at a time: to disarm one
    takes the kernel 8-16 ms.
    """
    if sys.platform != "linux":
        return Waking(
            None, [Candidate("triggers", False, "only Linux has them: the loop looks at fixed times")]
        )
    considered = []
    waker: Waker | None = None
    for place in _places(root, os.environ if environ is None else environ):
        if waker is not None:
            considered.append(Candidate(place.name, False, f"not needed: {waker.name} wakes the loop"))
            continue
        candidate, waker = _try(place, avoid, root)
        considered.append(candidate)
    return Waking(waker, considered)


def _try(place: _Place, avoid: frozenset[str], root: Path) -> tuple[Candidate, Waker | None]:
    if place.open is None:
        return Candidate(place.name, False, place.why), None
    try:
        waker = place.open()
    except OSError as error:
        return Candidate(place.name, False, _why_not(error, place, root)), None
    except BadInputError as error:
        return Candidate(place.name, False, str(error)), None
    if waker.name in avoid:
        waker.close()
        return Candidate(place.name, False, "it failed just now, and is tried again later"), None
    return Candidate(place.name, True, place.why), waker


def _places(root: Path, environ: Mapping[str, str]) -> list[_Place]:
    own = find_cgroups(root).unified
    places = [_of_systemd(environ)]
    if own is None or own.is_root:
        why = "the process is in no cgroup v2 of its own: start it with systemd-run --scope"
        places.append(_Place("trigger on memory.pressure of the own cgroup", None, why))
    else:
        places.append(_trigger(own.folder / "memory.pressure", "stall of the own cgroup", own.folder))
    return [*places, _trigger(root / "proc/pressure/memory", "stall of the whole machine", None)]


def _trigger(path: Path, of: str, cgroup: Path | None) -> _Place:
    return _Place(f"trigger on {path}", lambda: arm(path), f"wakes the loop on {of}", cgroup)


def _of_systemd(environ: Mapping[str, str]) -> _Place:
    """What the service manager asks to be watched."""
    try:
        watch = parse_watch(environ)
    except BadInputError as error:
        return _Place(WATCH, None, f"{error}: correct the unit, or unset it")
    if watch is None:
        return _Place(WATCH, None, "not set: no service manager asks for anything (MemoryPressureWatch=on)")
    if watch.off:
        return _Place(WATCH, None, "set to /dev/null: memory pressure handling is turned off")
    asked = watch  # for the closure: it is not None
    return _Place(
        f"{WATCH}={watch.path}", lambda: open_watch(asked), "wakes the loop when systemd's limit is passed"
    )


def _why_not(error: OSError, place: _Place, root: Path) -> str:
    if error.errno == errno.EINVAL:
        return "the kernel refuses the trigger: it is no trigger, or its window wants CAP_SYS_RESOURCE"
    if error.errno == errno.EBUSY:
        return "there is a trigger on this descriptor already"
    if place.name.startswith(WATCH):
        return f"it cannot be used: {error.strerror or error}"
    return why_no_psi(error, root, place.cgroup)
