"""The process that owns a sandbox: makes it, waits for its parent to close the pipe or die, removes it.

    python -m psi_kv_governor.sandbox.guardian PARENT NAME LIMIT_BYTES SWAP_BYTES

Everything is made here and not in the parent, so there is no moment at which a parent that is killed
leaves something behind that nobody knows of. Says in a line of JSON that the sandbox is ready (or why not),
and in another what could not be removed.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
from pathlib import Path

import msgspec

from psi_kv_governor.errors import PsiKvError
from psi_kv_governor.sandbox import cgroups, zram
from psi_kv_governor.sandbox.cgroups import Group

_LOOK_S = 1.0
"""Time between looks at the parent. The closed pipe says it at once, but a child that the parent forked
may hold the pipe open."""


class Told(msgspec.Struct, frozen=True, kw_only=True):
    """A line from the guardian."""

    zram: int | None = None
    """Number of the device that it made."""
    problem: str = ""
    """What could not be made or removed."""


def remove(group: Group, number: int | None) -> str:
    """Remove all of it, processes first. Gives what is left; empty when nothing is."""
    problems = [cgroups.remove_group(group), "" if number is None else zram.remove_swap(number)]
    return "; ".join(filter(None, problems))


def main(parent: int, name: str, limit_bytes: int, swap_bytes: int) -> int:
    """Own a sandbox until the parent lets go of it. Gives the exit status."""
    for signal_number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signal_number, signal.SIG_IGN)
    group = cgroups.find_place().below(name)
    number: int | None = None
    try:
        if swap_bytes:
            number = zram.add_swap(swap_bytes)
            with contextlib.suppress(OSError):  # whose it is, for `ps` and tests
                Path("/proc/self/comm").write_text(f"psi-kv-zram{number}")
        cgroups.make_group(group, limit_bytes, swap_bytes)
    except PsiKvError as error:
        remove(group, number)
        _say(Told(problem=str(error)))
        return error.exit_status
    _say(Told(zram=number))
    while os.getppid() == parent:
        readable, _, _ = select.select([sys.stdin], [], [], _LOOK_S)
        if readable and not os.read(sys.stdin.fileno(), 1):
            break
    problem = remove(group, number)
    _say(Told(problem=problem))
    return 1 if problem else 0


def _say(told: Told) -> None:
    with contextlib.suppress(BrokenPipeError):  # the parent is gone, and with it whoever would want to know
        os.write(sys.stdout.fileno(), msgspec.json.encode(told) + b"\n")


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2], *map(int, sys.argv[3:])))
