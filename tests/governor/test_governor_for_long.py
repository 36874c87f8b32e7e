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
from waiting import PATIENCE_S, until

STARTS = """
import ctypes, gc, os, sys, threading, time
from pathlib import Path
from psi_kv_governor.config import GovernorConfig
from psi_kv_governor.engines.simulated import SimulatedEngine
from psi_kv_governor.governor import Governor

engine = SimulatedEngine()
engine.add_cache(4096)
engine.decode(3000)
# The machine is read and nothing is given, whatever it is like now: a first trim would keep some objects.
config = GovernorConfig(high=1.0, high_max=1.0, acute_full=1.0, headroom_low=0.0, headroom_low_bytes=0)

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

def ended():  # threads that are done for Python and not for the system: a stack each, and an arena of malloc
    return len(os.listdir("/proc/self/task")) - threading.active_count()

first = ended()

def start_and_stop(times):
    for _ in range(times):
        with Governor(engine, config=config) as governor:
            governor.status()
        while ended() > first:
            time.sleep(0.001)
    return now()

print(start_and_stop(30), start_and_stop(100))
"""


def test_a_hundred_starts_and_stops_leave_no_thread_no_file_and_no_memory():
    """On the machine's own sources. In a process of its own, whose memory nothing else moves, nor which of
    the allocator's arenas a thread finds free."""
    done = subprocess.run(
        [sys.executable, "-I", "-c", STARTS],
        env={**os.environ, "MALLOC_ARENA_MAX": "1"},
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    before, after = ast.literal_eval(done.stdout.replace(") (", "), ("))
    assert (before[0], after[0]) == (1, 1)
    assert after[1] == before[1]
    objects, heap_bytes, kib = (now - then for now, then in zip(after[2:], before[2:], strict=True))
    assert objects < 70, "one a cycle would be 100"
    assert heap_bytes < 5000, "100 bytes a cycle would be 10,000"
    assert kib < 200, "a page a cycle would be 400"


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


def exit_status(child: int) -> int:
    """Of a forked child, which is given its time and not for ever."""
    ended: list[int] = []

    def looked() -> bool:
        pid, status = os.waitpid(child, os.WNOHANG)
        ended.extend([os.waitstatus_to_exitcode(status)] if pid else [])
        return bool(ended)

    until(looked, "the child hangs")
    return ended[0]


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
            assert exit_status(child) == 0


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
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=PATIENCE_S, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout
