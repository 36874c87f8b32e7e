"""The process that owns a sandbox: makes it, waits for its parent to close the pipe or die, removes it.

Everything is made here and not in the parent, so there is no moment at which a parent that is killed
leaves something behind that nobody knows of. Speaks JSON: the order is its one argument, then a line on
standard output when the sandbox is ready (or why not), and one with what could not be removed.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import select
import signal
import sys

import msgspec

from psi_kv_governor.errors import PsiKvError
from psi_kv_governor.sandbox import cgroups, zram

_LOOK_S = 1.0
"""Time between looks at the parent. The closed pipe says it at once, but a child that the parent forked
may hold the pipe open."""


class Order(msgspec.Struct, frozen=True, kw_only=True):
    """The sandbox that is wanted."""

    parent: int
    """Process id of the parent."""
    limit_bytes: int
    swap_bytes: int
    """Of its own zram device; 0 for none."""


class Made(msgspec.Struct, frozen=True, kw_only=True):
    """A line from the guardian: what it made, or what could not be made or removed."""

    group: cgroups.Group | None = None
    zram: int | None = None
    """Number of the device."""
    problem: str = ""


def make(order: Order) -> Made:
    """Make the device and the group. Raises PsiKvError, with nothing left behind."""
    place = cgroups.find_place()
    number = zram.add_swap(order.swap_bytes) if order.swap_bytes else None
    try:
        # A name that was never used: removing a group kills what is in it.
        name = f"psi-kv-sandbox-{order.parent}-{secrets.token_hex(4)}"
        group = cgroups.make_group(place, name, order.limit_bytes, order.swap_bytes)
    except PsiKvError:
        remove(Made(zram=number))
        raise
    return Made(group=group, zram=number)


def remove(made: Made) -> str:
    """Remove all of it, processes first. Gives what is left; empty when nothing is."""
    problems = [] if made.group is None else [cgroups.remove_group(made.group)]
    if made.zram is not None:
        problems.append(zram.remove_swap(made.zram))
    return "; ".join(filter(None, problems))


def main() -> int:
    """Own a sandbox until the parent lets go of it."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    order = msgspec.json.decode(sys.argv[1], type=Order)
    try:
        made = make(order)
    except PsiKvError as error:
        _say(Made(problem=str(error)))
        return error.exit_status
    _say(made)
    _wait_for_the_end(order.parent)
    problem = remove(made)
    _say(Made(problem=problem))
    return 1 if problem else 0


def _wait_for_the_end(parent: int) -> None:
    while os.getppid() == parent:
        readable, _, _ = select.select([sys.stdin], [], [], _LOOK_S)
        if readable and not os.read(sys.stdin.fileno(), 1):
            return


def _say(answer: Made) -> None:
    with contextlib.suppress(BrokenPipeError):  # the parent is gone, and with it whoever would want to know
        os.write(sys.stdout.fileno(), msgspec.json.encode(answer) + b"\n")


if __name__ == "__main__":
    sys.exit(main())
