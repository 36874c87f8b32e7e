"""How long a governor lives: its thread, the end of the interpreter, and forks."""

from __future__ import annotations

import atexit
import logging
import threading
import weakref
from typing import TYPE_CHECKING

from psi_kv_governor.forks import at_fork
from psi_kv_governor.pressure.bell import Bell

if TYPE_CHECKING:
    from psi_kv_governor.governor import Governor

_log = logging.getLogger("psi_kv_governor")

open_governors: weakref.WeakSet[Governor] = weakref.WeakSet()


def _after_fork() -> None:
    for governor in list(open_governors):
        governor.after_fork()


at_fork(in_child=_after_fork)


@atexit.register
def _close_all() -> None:
    """Before the interpreter goes down: its daemon threads are frozen then, and joining one never ends."""
    for governor in list(open_governors):
        governor.close()


def run(governor: weakref.ref[Governor], bell: Bell, stop: threading.Event) -> None:
    pause_s = 0.0
    while not stop.is_set():
        alive = governor()
        if alive is None:
            return
        try:
            pause_s = alive.step()
        except Exception:
            _log.exception("the governor failed in one turn and goes on")
            pause_s = 1.0
        del alive
        bell.wait(pause_s)
