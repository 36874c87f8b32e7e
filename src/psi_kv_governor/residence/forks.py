"""What is to be done around os.fork: whom it concerns stands still, and is told before and after."""

from __future__ import annotations

import threading
import weakref
from typing import Protocol

from psi_kv_governor.forks import at_fork


class Forked(Protocol):
    """Something that two processes must not have in common."""

    def before_fork(self) -> None:
        """Stand still, and make it safe to be in two processes. Must not raise."""

    def after_fork(self) -> None:
        """Go on, in each of the two."""


birth = threading.RLock()
"""Held while one is made: none may come into being between the first call and the fork itself."""

_members: weakref.WeakSet[Forked] = weakref.WeakSet()
_still: list[Forked] = []


def enter(member: Forked) -> None:
    """Tell `member` of forks for as long as it lives. Call it with `birth` held."""
    _members.add(member)


def members() -> list[Forked]:
    """All that are told."""
    return list(_members)


def _before_fork() -> None:
    birth.acquire()
    _still[:] = list(_members)
    for member in _still:
        member.before_fork()


def _after_fork() -> None:
    while _still:
        _still.pop().after_fork()
    birth.release()


at_fork(before=_before_fork, in_parent=_after_fork, in_child=_after_fork)
