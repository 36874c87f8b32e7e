"""Sensors over a fake machine, and real cgroups for the files that cannot be faked."""

from __future__ import annotations

import contextlib
import functools
import gc
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from psi_kv_governor import sensor as sensor_module
from psi_kv_governor.bus import Bus
from psi_kv_governor.events import Event, SourceChanged
from psi_kv_governor.pressure.cgroup import find_cgroups
from psi_kv_governor.pressure.discovery import discover
from psi_kv_governor.pressure.reading import PressureSource
from psi_kv_governor.pressure.waking import find_waker
from psi_kv_governor.sensor import Sensor
from waiting import PATIENCE_S, until

NOBODY = 65534
SOURCES = str(Path(sensor_module.__file__).parents[1])
OWN, MACHINE = "sys/fs/cgroup/app/memory.pressure", "proc/pressure/memory"
WHOLE = Path("/proc/pressure/memory")
needs_psi = pytest.mark.skipif(not WHOLE.exists(), reason="this kernel keeps no PSI: boot with psi=1")


class Watched:
    """A sensor with what it told."""

    def __init__(
        self,
        monkeypatch: pytest.MonkeyPatch,
        root: Path,
        environ: dict[str, str],
        source: PressureSource | None = None,
    ) -> None:
        self.events: list[Event] = []
        self.environ = environ
        monkeypatch.setattr(sensor_module, "discover", functools.partial(discover, root, environ))
        monkeypatch.setattr(sensor_module, "find_waker", functools.partial(find_waker, root, environ))
        bus = Bus()
        bus.subscribe(self.events.append)
        self.sensor = Sensor(source, bus)
        self.events.clear()

    def changes(self) -> list[tuple[str, str]]:
        return [(event.source, event.why) for event in self.events if isinstance(event, SourceChanged)]

    def later(self) -> None:
        """The time for the next search has come."""
        self.sensor._look_again_s = 0.0


def stays_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    """What failed just now has failed just now however long this process stands still."""
    monkeypatch.setattr(sensor_module, "_BACKOFF_S", 10 * PATIENCE_S)


@contextlib.contextmanager
def v2_group(name: str) -> Iterator[Path]:
    """An empty cgroup of this machine's unified hierarchy, with a `memory.pressure` of the kernel's."""
    unified = find_cgroups().unified
    if unified is None or not os.access(unified.folder, os.W_OK):
        pytest.skip("no cgroup v2 can be made here: run it as root")
    folder = unified.folder / f"psi-kv-test-{os.getpid()}-{name}"
    folder.mkdir()
    try:
        if not (folder / "memory.pressure").exists():
            pytest.skip("this kernel keeps no PSI: boot with psi=1")
        yield folder
    finally:
        until(lambda: _removed(folder), f"{folder} is still in use")


def _removed(folder: Path) -> bool:
    """Of a process that has ended the kernel may take its time to leave the cgroup."""
    with contextlib.suppress(OSError):
        folder.rmdir()
    return not folder.exists()


@contextlib.contextmanager
def as_nobody() -> Iterator[None]:
    """Without root's rights to files."""
    if os.geteuid() != 0:
        pytest.skip("only root can become somebody else")
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


def in_own_process(script: str, *arguments: object, environ: dict[str, str] | None = None) -> str:
    """What `script` prints when it runs by itself."""
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": SOURCES, **(environ or {})},
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def open_descriptors() -> int:
    """Of this process, without what earlier tests left to the garbage collector, which comes any time."""
    gc.collect()
    return len(list(Path("/proc/self/fd").iterdir()))


LONG_S = 2 * PATIENCE_S
"""A sleep that something is to end."""


def is_ended(wait: Callable[[float], object]) -> bool:
    """Whether something ends the sleep `wait` of LONG_S."""
    return lasted_s(lambda: wait(LONG_S)) < PATIENCE_S


def lasted_s(action: Callable[[], object]) -> float:
    """How long `action` took."""
    before_s = time.monotonic()
    action()
    return time.monotonic() - before_s


def refuse(monkeypatch, module, number: int) -> None:
    """Arming a trigger fails as the kernel would have it fail."""

    def refused(path: Path) -> None:
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(module, "arm", refused)
