"""What the kernel itself tells of its levels: another container that thrashes is no shortage of ours."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import msgspec
import pytest

from psi_kv_governor.config import GovernorConfig
from psi_kv_governor.control import Action, CacheSnapshot, LawState, decide
from psi_kv_governor.pressure.cgroup import OwnCgroups
from psi_kv_governor.pressure.headroom import HeadroomReader
from psi_kv_governor.pressure.machine import MachineSource
from psi_kv_governor.pressure.psi import PsiFile
from psi_kv_governor.pressure.reading import MACHINE, Reading
from psi_kv_governor.residence.storage import memory_backed
from psi_kv_governor.sandbox.sandbox import Sandbox
from waiting import until

MIB = 1 << 20
WHOLE = Path("/proc/pressure/memory")

THRASHES = """
import mmap, os, sys
with open(sys.argv[1], "wb") as file:
    for _ in range(96):
        file.write(bytes(1 << 20))
    os.fsync(file.fileno())
print("ready", flush=True)
with open(sys.argv[1], "rb") as file:
    data = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
while True:
    for page in range(0, len(data), mmap.PAGESIZE):
        data[page]
"""


@pytest.mark.cgroup
@pytest.mark.skipif(not WHOLE.exists(), reason="this kernel keeps no PSI: boot with psi=1")
def test_another_container_that_thrashes_is_no_shortage_of_the_machine(tmp_path):
    """It reads 96 MiB over and over in a cgroup of 40 MiB: the whole machine's PSI counts that.

    Looked at in a second in which nobody else makes the kernel reclaim: files that others read are enough.
    """
    if memory_backed(tmp_path):
        pytest.skip("the folder of the tests is in memory: set --basetemp to one on a disk")
    source = MachineSource(
        PsiFile(WHOLE), HeadroomReader(OwnCgroups(None, None), environ={}), "test", level=MACHINE
    )
    cache = CacheSnapshot(
        live_bytes=100, masked_bytes=0, lost_bytes=0, trimmable_bytes=90, lossless_bytes=0, step_bytes=1
    )
    # As if the machine were tight, so that its stall would count: plenty is more than there is.
    config = GovernorConfig(headroom_plenty=1.0, headroom_plenty_bytes=1 << 50, high=0.01, low=0.005)
    # But not by what others have taken: it is the stall that is looked at.
    config = msgspec.structs.replace(config, headroom_low=0.0, headroom_low_bytes=0)
    calm: list[Reading] = []

    def is_seen() -> bool:
        time.sleep(0.1)
        calm.append(source.read())
        if calm[-1].levels[0].bites is not False:
            calm.clear()
        return sum(one.some >= 0.01 for one in calm) >= 10

    with Sandbox(40 * MIB) as pen:
        child = pen.popen([sys.executable, "-c", THRASHES, str(tmp_path / "data")], stdout=subprocess.PIPE)
        assert child.stdout.readline() == b"ready\n"
        until(is_seen)  # the kernel reclaims for the pen alone, and its stall is the machine's too
    source.close()
    assert Action.TRIM not in actions(config, calm, cache)
    blind = [
        msgspec.structs.replace(one, levels=(msgspec.structs.replace(one.levels[0], bites=None),))
        for one in calm
    ]
    assert Action.TRIM in actions(config, blind, cache)  # that alone tells it from a shortage


def actions(config: GovernorConfig, looks: list[Reading], cache: CacheSnapshot) -> set[Action]:
    """What the law does with these readings."""
    state, found = LawState(), set()
    for look in looks:
        decision, state = decide(config, state, look, cache)
        found.add(decision.action)
    return found
