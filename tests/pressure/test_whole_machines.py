"""Sensing on whole small machines with a kernel of their own, which has no PSI: User Mode Linux."""

from __future__ import annotations

import pytest

import uml

pytestmark = [pytest.mark.uml, pytest.mark.slow]

HEAD = """
import json, os, subprocess, sys, time
from pathlib import Path
from psi_kv_governor.config import GovernorConfig
from psi_kv_governor.control import CacheSnapshot, LawState, decide
from psi_kv_governor.pressure.discovery import discover
from psi_kv_governor.pressure.headroom import HeadroomReader
from psi_kv_governor.pressure.cgroup import find_cgroups
MIB = 1 << 20
TOP = Path("/sys/fs/cgroup")

def told(found):
    return {one.name: one.why for one in found.considered}

def levels(reading):
    return {one.name.removeprefix(str(TOP)): [one.headroom_bytes, one.limit_bytes, one.limit, one.bites]
            for one in reading.levels}
"""

BARE = (
    HEAD
    + """
found = discover()
first = found.source.read()
cache = CacheSnapshot(live_bytes=100 * MIB, masked_bytes=0, lost_bytes=0, trimmable_bytes=80 * MIB,
                      lossless_bytes=0, step_bytes=MIB)
# File pages until the kernel reclaims for the machine itself: that costs no headroom worth speaking of.
read, bites, files = 0, [], []
while found.source.read().levels[0].bites is None:  # after a look that took long it is not asked for a while
    time.sleep(0.01)
bites.append(found.source.read().levels[0].bites)
for folder, _, names in os.walk("/usr/lib"):
    for name in names:
        path = os.path.join(folder, name)
        if os.path.isfile(path) and not os.path.islink(path) and os.path.getsize(path) > MIB:
            files.append(open(path, "rb"))  # hostfs forgets pages when nobody has the file open
            while data := files[-1].read(MIB):
                read += len(data)
    bites.append(found.source.read().levels[0].bites)
    if bites[-1] or read > 700 * MIB:
        break
full = found.source.read()
# And a process that takes memory, until the law acts: on headroom alone, before the kernel kills.
held, state, asked = [], LawState(), None
while asked is None:
    held.append(bytearray(os.urandom(1 << 16) * 16))
    time.sleep(0.005)
    reading = found.source.read()
    decision, state = decide(GovernorConfig(), state, reading, cache)
    asked = [decision.reason, reading.headroom_bytes] if decision.action == "trim" else None
print(json.dumps({"source": found.source.name, "told": told(found), "stall": [first.some, first.interval_s],
    "first": levels(first), "full": levels(full), "bites": bites, "asked": asked, "read": read,
    "vmstat": [line for line in Path("/proc/vmstat").read_text().splitlines() if "pgscan" in line]}))
"""
)


def test_a_board_without_psi_and_without_cgroups_of_its_own_goes_by_headroom(tmp_path):
    seen = uml.run(BARE, tmp_path, memory_mib=256)
    assert seen["source"].startswith("headroom alone")
    assert "psi=1" in seen["told"]["/proc/pressure/memory"]
    assert "the root, which has no limit" in seen["told"]["memory.events of the own cgroup"]
    assert list(seen["first"]) == ["machine"]
    headroom, limit, what, _ = seen["first"]["machine"]
    assert 100 << 20 < headroom <= limit < 256 << 20
    assert what == "MemAvailable"
    # The kernel's own counters, on its own machine: reading files makes it reclaim, and takes no headroom.
    assert True in seen["bites"], (seen["read"], seen["vmstat"])
    assert False in seen["bites"]
    assert seen["full"]["machine"][0] > 0.6 * limit
    reason, left = seen["asked"]
    assert reason.startswith("machine at MemAvailable: ")
    assert 0 < left < 0.15 * limit


def test_a_board_without_the_memory_controller_is_told_how_to_get_it(tmp_path):
    script = (
        HEAD
        + """
(TOP / "app").mkdir()
(TOP / "app/cgroup.procs").write_text(str(os.getpid()))
found = discover()
print(json.dumps({"source": found.source.name, "told": told(found), "levels": levels(found.source.read())}))
"""
    )
    seen = uml.run(script, tmp_path, options=("cgroup_disable=memory",))
    assert seen["source"].startswith("headroom alone")
    assert "cgroup_enable=memory" in seen["told"]["memory.events of the own cgroup"]
    assert list(seen["levels"]) == ["machine"]


SLICE = (
    HEAD
    + """
(TOP / "cgroup.subtree_control").write_text("+memory")
for name in ("slice", "slice/pod", "slice/other"):
    (TOP / name).mkdir()
    if name == "slice":
        (TOP / "slice/cgroup.subtree_control").write_text("+memory")
(TOP / "slice/memory.high").write_text(str(300 * MIB))
(TOP / "slice/pod/memory.max").write_text(str(160 * MIB))
(TOP / "slice/other/memory.max").write_text(str(16 * MIB))
(TOP / "slice/pod/cgroup.procs").write_text(str(os.getpid()))
found = discover()
first = found.source.read()
join = "echo $$ > /sys/fs/cgroup/slice/other/cgroup.procs; cat /usr/bin/* | head -c 100M > /dev/null"
subprocess.run(["sh", "-c", join], stderr=subprocess.DEVNULL)
other = found.source.read()
thrashed = int((TOP / "slice/memory.events").read_text().split("max ")[1].split()[0])
time.sleep(2.1)
files, read = [], 0
for path in Path("/usr/bin").iterdir():
    if path.is_file() and read < 240 * MIB:
        files.append(path.open("rb"))  # hostfs forgets pages when nobody has the file open
        read += len(files[-1].read())
own = found.source.read()
print(json.dumps({"source": found.source.name, "first": levels(first), "other": levels(other),
    "thrashed": thrashed, "own": levels(own)}))
"""
)


def test_in_a_slice_the_limit_that_bites_is_told_from_a_sibling_s(tmp_path):
    """With the memory controller of cgroup v2: a sibling meets its own limit thousands of times, and the
    events of the slice count that, while neither the slice's limit nor ours was met."""
    seen = uml.run(SLICE, tmp_path)
    assert seen["source"].endswith("slice/pod/memory.events")
    assert [(name, level[2]) for name, level in seen["first"].items()] == [
        ("/slice/pod", "memory.max"),
        ("/slice", "memory.high"),
        ("machine", "MemAvailable"),
    ]
    assert [level[1] >> 20 for level in seen["first"].values()][:2] == [160, 300]
    assert seen["thrashed"] > 100
    assert [seen["other"][name][3] for name in ("/slice/pod", "/slice")] == [False, False]
    assert seen["own"]["/slice/pod"][3] is True
    assert seen["own"]["/slice/pod"][0] > 80 << 20  # it is at its limit by file pages: no shortage
