"""A scripted scene for `psi-kv tune`: in a pen of its own, a neighbour takes what there is, twice.

First as fast as it can, then at a tenth of the limit a second. What is read is what a governor in the pen
would read.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from contextlib import closing

from psi_kv_governor.bench import load
from psi_kv_governor.bench.children import Children
from psi_kv_governor.bench.pen import Pen, Swap
from psi_kv_governor.errors import PsiKvError
from psi_kv_governor.pressure.cgroup import Cgroup, OwnCgroups
from psi_kv_governor.pressure.headroom import HeadroomReader
from psi_kv_governor.pressure.machine import MachineSource
from psi_kv_governor.pressure.psi import PsiFile
from psi_kv_governor.pressure.reading import Reading

MIB = 1 << 20

LIMIT_BYTES = 160 * MIB
"""Small, so that it is over soon; thresholds are shares of the limit."""
SWAP_BYTES = 160 * MIB
HELD_MIB = 56
"""What stands for the model: taken before, and touched all the time."""
TAKEN_MIB = 120
"""More than is left. Without swap it is less than what is left, so that nobody is killed."""
TAKEN_WITHOUT_SWAP_MIB = 76

STEPS = ((24, 0.0), (4, 0.25))
"""MiB at a time and the pause after it, for each of the two neighbours."""

LOOK_S = 0.02
CALM_S = 2.0
PRESSED_S = 8.0


def play(swap: Swap, told: Callable[[str], None]) -> list[list[Reading]]:
    """The readings of each neighbour, from the moment in which it is started.

    `told` hears what is going on. Raises PsiKvError where there is no pen, or no stall is told in it.
    """
    return [_played(swap, step_mib, pause_s, told) for step_mib, pause_s in STEPS]


def _played(swap: Swap, step_mib: int, pause_s: float, told: Callable[[str], None]) -> list[Reading]:
    swap_bytes = SWAP_BYTES if swap == "zram" else 0
    taken_mib = TAKEN_MIB if swap == "zram" else TAKEN_WITHOUT_SWAP_MIB
    with (
        Pen(LIMIT_BYTES, swap=swap, swap_bytes=swap_bytes) as pen,
        closing(_source(pen)) as source,
        Children(pen.popen) as children,
    ):
        told(f"a pen of {LIMIT_BYTES // MIB} MiB with a process of {HELD_MIB} MiB")
        children.start(_neighbour(HELD_MIB, HELD_MIB, 0.0))
        watch(source, CALM_S)
        told(f"a neighbour takes {taken_mib} MiB, {step_mib} MiB every {pause_s:g} s")
        children.start(_neighbour(taken_mib, step_mib, pause_s))
        return watch(source, PRESSED_S)


def watch(source: MachineSource, seconds: float, look_s: float = LOOK_S) -> list[Reading]:
    """Readings of so many seconds."""
    end_s = time.monotonic() + seconds
    readings = []
    while time.monotonic() < end_s:
        readings.append(source.read())
        time.sleep(look_s)
    return readings


def _source(pen: Pen) -> MachineSource:
    if pen.pressure_file is None:
        raise PsiKvError("no stall is told in a cgroup here: boot with psi=1 and cgroup v2")
    try:
        psi = PsiFile(pen.pressure_file)
    except OSError as error:
        raise PsiKvError(f"{pen.pressure_file} cannot be read: {error.strerror}; boot with psi=1") from error
    version = pen.group.place.version
    own = Cgroup(version, pen.group.memory, pen.group.memory)
    cgroups = OwnCgroups(own, None) if version == 2 else OwnCgroups(None, own)
    return MachineSource(psi, HeadroomReader(cgroups), "the pen")


def _neighbour(mib: int, step_mib: int, pause_s: float) -> Sequence[str]:
    argv = [sys.executable, "-m", load.__name__, "--mib", str(mib)]
    return [*argv, "--step-mib", str(step_mib), "--pause-s", str(pause_s)]
