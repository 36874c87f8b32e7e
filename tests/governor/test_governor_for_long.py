"""A hundred starts and stops, several at once, and forks: nothing is left over."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import threading
import time

import pytest
from governor_help import state

from fakes import FakeSource
from psi_kv_governor.config import GovernorConfig
from psi_kv_governor.engines.simulated import SimulatedEngine
from psi_kv_governor.governor import Governor
from waiting import until

STARTS = """
import ctypes, gc, sys, threading
from pathlib import Path
from psi_kv_governor.config import GovernorConfig
from psi_kv_governor.engines.simulated import SimulatedEngine
from psi_kv_governor.governor import Governor

engine = SimulatedEngine()
engine.add_cache(4096)
engine.decode(3000)

NAMES = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"

class Heap(ctypes.Structure):  # mallinfo2(3)
    _fields_ = [(name, ctypes.c_size_t) for name in NAMES.split()]

asked = getattr(ctypes.CDLL(None), "mallinfo2", Heap)  # of glibc 2.33 and later; elsewhere it is all zero
asked.restype = Heap

def now():
    gc.collect()
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    kib = next(int(line.split()[1]) for line in lines if line.startswith("Anonymous:"))
    heap = asked()
    files = len(list(Path("/proc/self/fd").iterdir()))
    return threading.active_count(), files, sys.getallocatedblocks(), heap.uordblks + heap.hblkhd, kib

def start_and_stop(times):
    for _ in range(times):
        with Governor(engine, config=GovernorConfig()) as governor:
            governor.status()
    return now()

print(start_and_stop(30), start_and_stop(100))
"""


@pytest.mark.timeout(180)
def test_a_hundred_starts_and_stops_leave_no_thread_no_file_and_no_memory():
    """On the machine's own sources. In a process of its own, whose memory nothing else moves."""
    done = subprocess.run(
        [sys.executable, "-I", "-c", STARTS], capture_output=True, text=True, timeout=150, check=False
    )
    assert done.returncode == 0, done.stderr
    before, after = ast.literal_eval(done.stdout.replace(") (", "), ("))
    assert (before[0], after[0]) == (1, 1)
    assert after[1] == before[1]
    objects, heap_bytes, kib = (now - then for now, then in zip(after[2:], before[2:], strict=True))
    assert objects < 70, "one a cycle would be 100"
    assert heap_bytes < 5000, "100 bytes a cycle would be 10,000"
    assert kib < 200, "a page a cycle would be 400"


@pytest.mark.timeout(180)
def test_two_governors_in_one_process_each_have_their_own_floor_and_get_their_own_back():
    source = FakeSource()
    config = GovernorConfig(quiet_s=0.05, cooldown_s=0.01, poll_s=0.01, poll_busy_s=0.01, futile_trims=1000)
    engines, opened = [], []
    for _ in range(2):
        engine = SimulatedEngine()
        engine.add_cache(4096).sequence(0).running = True
        engine.decode(3000)
        engines.append(engine)
        opened.append(Governor(engine, source=source, config=config))
    source.stall = 1.0
    for governor in opened:
        governor.start()
    until(lambda: all(state(engine).live_cells <= 800 for engine in engines))
    time.sleep(0.1)
    assert all(state(engine).live_cells >= 600 for engine in engines)
    source.stall = 0.0
    until(lambda: all(state(engine).masked_cells == 0 for engine in engines))
    assert all(state(engine).live_cells == 3000 for engine in engines)
    for governor in opened:
        governor.close()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_a_forked_child_is_ungoverned_and_hangs_nowhere(engine):
    """Whatever a thread of the parent held at that moment."""
    source = FakeSource(stall=1.0)
    config = GovernorConfig(poll_s=0.001, poll_busy_s=0.001, cooldown_s=0.0)
    with Governor(engine, source=source, config=config) as governor:
        for _ in range(20):
            child = os.fork()
            if child == 0:
                try:
                    alone = threading.active_count() == 1
                    engine._lock = threading.RLock()  # of the engine, which is the parent's thread's too
                    governor.status()
                    governor.trim(0.1)
                    governor.close()
                    os._exit(0 if alone and governor.has_room() else 1)
                finally:
                    os._exit(2)
            end_s = time.monotonic() + 20
            while (ended := os.waitpid(child, os.WNOHANG))[0] == 0:
                assert time.monotonic() < end_s, "the child hangs"
                time.sleep(0.002)
            assert os.waitstatus_to_exitcode(ended[1]) == 0


def test_a_program_that_closes_nothing_ends_all_the_same():
    """It is closed when Python ends, and needs its threads for that."""
    program = (
        "from psi_kv_governor.engines.simulated import SimulatedEngine\n"
        "from psi_kv_governor.governor import Governor\n"
        "engine = SimulatedEngine()\n"
        "engine.add_cache(4096)\n"
        "governor = Governor(engine)\n"
        "governor.start()\n"
        "print(governor.status().mode.value)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout
