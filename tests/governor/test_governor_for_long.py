"""A thousand starts and stops, and several at once: nothing is left over, and none disturbs another."""

from __future__ import annotations

import ast
import subprocess
import sys
import time
from pathlib import Path

import pytest
from governor_help import until

from fakes import FakeSource
from psi_kv_governor.config import GovernorConfig
from psi_kv_governor.engine.simulated import SimulatedEngine
from psi_kv_governor.governor import Governor
from psi_kv_governor.ledger import LIVE, SPILLED
from psi_kv_governor.store.disk import DiskStore
from psi_kv_governor.store.mounts import memory_backed

STARTS = """
import gc, threading
from pathlib import Path
from psi_kv_governor.config import GovernorConfig
from psi_kv_governor.engine.simulated import SimulatedEngine
from psi_kv_governor.governor import Governor

engine = SimulatedEngine(4096)
engine.grow(3000)

def now():
    gc.collect()
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    kib = next(int(line.split()[1]) for line in lines if line.startswith("Anonymous:"))
    return threading.active_count(), len(list(Path("/proc/self/fd").iterdir())), kib

def start_and_stop(times):
    for _ in range(times):
        with Governor(engine, config=GovernorConfig(store="none")) as governor:
            governor.status()
    return now()

print(start_and_stop(400), start_and_stop(600))
"""


@pytest.mark.timeout(180)
def test_a_thousand_starts_and_stops_leave_no_thread_no_file_and_no_memory():
    """On the machine's own sources. In a process of its own, whose memory nothing else moves."""
    done = subprocess.run(
        [sys.executable, "-c", STARTS], capture_output=True, text=True, timeout=150, check=False
    )
    assert done.returncode == 0, done.stderr
    (threads, files, kib), (more_threads, more_files, more_kib) = ast.literal_eval(
        done.stdout.replace(") (", "), (")
    )
    assert (threads, more_threads) == (1, 1)
    assert more_files == files
    assert more_kib - kib < 300, "a KiB a cycle would be 600"


@pytest.fixture
def folder(tmp_path) -> Path:
    if memory_backed(tmp_path):
        pytest.skip("/tmp is memory here, and the disk store refuses it")
    return tmp_path


@pytest.mark.timeout(60)
def test_two_governors_on_one_machine_share_a_folder_and_each_gets_its_own_back(folder):
    engines = [SimulatedEngine(4096) for _ in range(2)]
    source = FakeSource()
    config = GovernorConfig(quiet_s=0.05, cooldown_s=0.01, poll_s=0.01, poll_busy_s=0.01, futile_trims=1000)
    opened = []
    for engine in engines:
        engine.grow(3000)
        store = DiskStore(folder, 1 << 30, 0)
        opened.append((Governor(engine, source=source, store=store, config=config), store))
    source.stall = 1.0
    for governor, _ in opened:
        governor.start()
    until(lambda: all(engine.ledger.count(LIVE) <= 800 for engine in engines))
    time.sleep(0.1)
    assert all(engine.ledger.count(LIVE) >= 600 for engine in engines)  # each has its own floor
    assert list(folder.iterdir()) == []
    source.stall = 0.0
    until(lambda: all(engine.ledger.count(SPILLED) == 0 for engine in engines))
    assert all(engine.ledger.count(LIVE) == 3000 for engine in engines)
    for governor, store in opened:
        governor.close()
        store.close()
