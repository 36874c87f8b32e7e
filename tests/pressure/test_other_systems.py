"""The package and its command where there is no PSI, no cgroup, no /proc, and half of POSIX is missing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import psi_kv_governor
from psi_kv_governor.errors import EngineError
from psi_kv_governor.native import building
from waiting import PATIENCE_S

RUNNER = Path(__file__).with_name("other_system.py")
SYSTEMS = pytest.mark.parametrize("system", ["darwin", "win32"])


def psi_kv(system: str, tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`psi-kv` as it would run on `system`."""
    sources = str(Path(psi_kv_governor.__file__).parents[1])
    return subprocess.run(
        [sys.executable, str(RUNNER), system, *arguments],
        env={**os.environ, "PYTHONPATH": sources, "XDG_CACHE_HOME": str(tmp_path), "HOME": str(tmp_path)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )


@SYSTEMS
def test_simulate_gives_the_same_as_on_linux(system, tmp_path):
    arguments = ("simulate", "--scenario", "ramp", "--seed", "7", "--json")
    done = psi_kv(system, tmp_path, *arguments)
    assert (done.returncode, done.stderr) == (0, "")
    here = subprocess.run(
        [sys.executable, "-m", "psi_kv_governor.cli", *arguments],
        env={**os.environ, "PYTHONPATH": str(Path(psi_kv_governor.__file__).parents[1])},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=True,
    )
    assert done.stdout == here.stdout


@SYSTEMS
def test_doctor_says_what_there_is_and_what_is_not(system, tmp_path):
    """With a model that is not there: llama.cpp itself can't be loaded as on another system."""
    done = psi_kv(system, tmp_path, "doctor", "--model", "absent.gguf", "--json")
    assert done.stderr == ""
    checks = {check["name"]: check for check in json.loads(done.stdout)["checks"]}
    assert checks["pressure"]["state"] == "warn"
    assert "psutil" in checks["pressure"]["detail"]
    assert "polled only" in checks["pressure"]["detail"]
    assert any("only Linux has them" in line for line in checks["pressure"]["more"])
    assert checks["agent"]["state"] == "fail"
    assert "needs Linux" in checks["agent"]["remedy"]


GOVERN = """
import sys
sys.path.insert(0, sys.argv[1])
import other_system
other_system.become(sys.argv[2])
import time
from psi_kv_governor import Governor, GovernorConfig
from psi_kv_governor.engines.simulated import SimulatedEngine
engine = SimulatedEngine()
engine.add_cache(4096)
engine.decode(3000)
# Whatever is free here now, it is told and nothing is given for it.
config = GovernorConfig(poll_s=0.02, headroom_low=0.0, headroom_low_bytes=0)
with Governor(engine, config=config) as governor:
    while (status := governor.status()).headroom_bytes is None:
        time.sleep(0.01)
    print(status.source, status.some, status.headroom_bytes > 0, governor.trim(0.5).cells > 0)
"""


@SYSTEMS
def test_the_governor_runs_on_what_psutil_tells(system, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", GOVERN, str(RUNNER.parent), system],
        env={**os.environ, "PYTHONPATH": str(Path(psi_kv_governor.__file__).parents[1])},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert done.stdout == "headroom alone (psutil) 0.0 True True\n", done.stderr


def test_on_windows_no_memory_can_be_returned_and_it_says_so(monkeypatch):
    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(EngineError, match="needs Linux"):
        building.agent_path()
