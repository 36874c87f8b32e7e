"""How long a governor lives: its thread, the end of the interpreter, and forks."""

from __future__ import annotations

import atexit
import threading
import weakref
from typing import Protocol

from psi_kv_governor.forks import at_fork
from psi_kv_governor.pressure.sleeper import Sleeper


class Living(Protocol):
    """What is asked of a governor here."""

    def step(self) -> float: ...

    def close(self) -> None: ...

    def after_fork(self) -> None: ...


open_governors: weakref.WeakSet[Living] = weakref.WeakSet()


def _after_fork() -> None:
    for governor in list(open_governors):
        governor.after_fork()


at_fork(in_child=_after_fork)


@atexit.register
def _close_all() -> None:
    """Before the interpreter goes down: its daemon threads are frozen then, and joining one never ends."""
    for governor in list(open_governors):
        governor.close()


class Ended:
    """Set once, and for good. Not a threading.Event: its lock is written in Python, and a Ctrl-C in its
    release would leave it closed."""

    def __init__(self) -> None:
        self._set = False

    def set(self) -> None:
        self._set = True

    def __bool__(self) -> bool:
        return self._set


def run(governor: weakref.ref[Living], sleeper: Sleeper, ended: Ended) -> None:
    """The loop's thread, until it has `ended` or the governor was dropped."""
    pause_s = 0.0
    while not ended:
        alive = governor()
        if alive is None:
            return
        pause_s = alive.step()
        del alive
        sleeper.wait(pause_s)


def started(governor: weakref.ref[Living], sleeper: Sleeper, ended: Ended) -> threading.Thread:
    """That thread, running. Raises RuntimeError where none is to be had (TasksMax=, RLIMIT_NPROC)."""
    given = (governor, sleeper, ended)
    thread = threading.Thread(target=run, args=given, name="psi-kv-governor", daemon=True)
    thread.start()
    return thread
