"""A short coverage-guided fuzz run of every parser; `scripts/fuzz.py --seconds 600` is a long one."""

from __future__ import annotations

import importlib.util
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from waiting import PATIENCE_S

SCRIPT = Path(__file__).parents[2] / "scripts" / "fuzz.py"


def load_script():
    spec = importlib.util.spec_from_file_location("fuzz_script", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


TARGETS = load_script().TARGETS
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("atheris") is None,
        reason=f"no coverage-guided fuzzing: atheris is not installed (Python {platform.python_version()} on "
        f"{platform.machine()}; there are wheels for Linux on x86-64)",
    ),
]


def fuzz(folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.mark.parametrize("target", TARGETS)
def test_a_parser_raises_nothing_but_its_declared_errors(target, tmp_path):
    assert "inputs" in fuzz(tmp_path, target, "--seconds", "2", "--runs", "20000")
    for slow in tmp_path.glob("*-slow-unit-*"):  # ten seconds: unless it takes them again, all stood still
        again = slow.rename(tmp_path / "again")
        fuzz(tmp_path, target, "--repeat", str(again))
        again.unlink()
    assert list(tmp_path.iterdir()) == []


PLANTED = """
import sys
import atheris
sys.path.insert(0, sys.argv[1])
import fuzz

@atheris.instrument_func
def parse(data):
    if data[:2] == b"so" and len(data) > 4:
        raise KeyError("nobody declared this")

fuzz.TARGETS["planted"] = fuzz.Target(lambda file: parse, ())
fuzz.fuzz("planted", ["-runs=1000000", "-max_total_time=250", "-verbosity=0"])
"""


def test_a_planted_mistake_is_found(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", PLANTED, str(SCRIPT.parent)],
        env={"PYTHONPATH": str(SCRIPT.parents[1] / "src"), "PATH": "/usr/bin:/bin"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert done.returncode != 0
    assert "nobody declared this" in done.stdout + done.stderr


def test_an_unknown_target_is_refused():
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "psy"], capture_output=True, text=True, timeout=PATIENCE_S, check=False
    )
    assert done.returncode == 2
    assert "known are psi" in done.stderr
