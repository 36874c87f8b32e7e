"""A scripted scene for `psi-kv tune`: in a sandbox of its own, a neighbour takes what there is, twice.

First as fast as it can, then at a tenth of the limit a second. What is read is what a governor in the sandbox
would read.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import closing

from psi_kv_governor.errors import PsiKvError
from psi_kv_governor.pressure.headroom import HeadroomReader
from psi_kv_governor.pressure.machine import MachineSource
from psi_kv_governor.pressure.psi import PsiFile
from psi_kv_governor.pressure.reading import Reading
from psi_kv_governor.sandbox.children import Child, neighbour
from psi_kv_governor.sandbox.load import MIB
from psi_kv_governor.sandbox.sandbox import Sandbox

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


def play(with_swap: bool, say: Callable[[str], None]) -> list[list[Reading]]:
    """The readings of each neighbour, from the moment in which it is started.

    `say` hears what is going on. Raises PsiKvError where there is no sandbox, or its kernel counts no stall.
    """
    return [_played(with_swap, step_mib, pause_s, say) for step_mib, pause_s in STEPS]


def _played(with_swap: bool, step_mib: int, pause_s: float, say: Callable[[str], None]) -> list[Reading]:
    swap_bytes, taken_mib = (SWAP_BYTES, TAKEN_MIB) if with_swap else (0, TAKEN_WITHOUT_SWAP_MIB)
    with (
        Sandbox(LIMIT_BYTES, swap_bytes=swap_bytes) as sandbox,
        closing(_source(sandbox)) as source,
    ):
        say(f"a cgroup of {LIMIT_BYTES // MIB} MiB with a process of {HELD_MIB} MiB")
        with Child(neighbour(HELD_MIB, HELD_MIB, 0.0), sandbox.popen) as held:
            _until_said(source, held)
            watch(source, CALM_S)
            say(f"a neighbour takes {taken_mib} MiB, {step_mib} MiB every {pause_s:g} s")
            with Child(neighbour(taken_mib, step_mib, pause_s), sandbox.popen) as beside:
                return [*_until_said(source, beside), *watch(source, PRESSED_S)]


def _until_said(source: MachineSource, child: Child) -> list[Reading]:
    """Readings until it begins to take memory: on a busy machine its interpreter needs seconds to start."""
    readings = watch(source, LOOK_S)
    while not (child.hear(0.0) or child.ended):
        readings += watch(source, LOOK_S)
    return readings


def watch(source: MachineSource, seconds: float, look_s: float = LOOK_S) -> list[Reading]:
    """Readings of so many seconds."""
    end_s = time.monotonic() + seconds
    readings = []
    while time.monotonic() < end_s:
        readings.append(source.read())
        time.sleep(look_s)
    return readings


def _source(sandbox: Sandbox) -> MachineSource:
    if sandbox.pressure_file is None:
        raise PsiKvError("no stall is told in a cgroup here: boot with psi=1 and cgroup v2")
    try:
        psi = PsiFile(sandbox.pressure_file)
    except OSError as error:
        raise PsiKvError(
            f"{sandbox.pressure_file} cannot be read: {error.strerror}; boot with psi=1"
        ) from error
    return MachineSource(psi, HeadroomReader(sandbox.own_cgroups()), "the sandbox")
