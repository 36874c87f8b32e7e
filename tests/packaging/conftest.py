"""Servers that somebody else wrote are had in tests/service/servers.py. The wheel is built once."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from packages_help import alone

ROOT = Path(__file__).parents[2]

sys.path.append(str(ROOT / "tests" / "service"))


@pytest.fixture(scope="session")
def wheel(tmp_path_factory) -> Path:
    """That of this machine, as `pip wheel` makes it, less the optimiser of C, which takes 6 s: once for all
    workers, whose folders lie side by side."""
    own = tmp_path_factory.getbasetemp()
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    kept["CC"] = str(ROOT / "tests" / "quick-cc")
    with alone((own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "wheel") as folder:
        if not (built := list(folder.glob("*.whl"))):
            words = (
                "-m",
                "pip",
                "wheel",
                "--quiet",
                "--disable-pip-version-check",
                "--no-deps",
                "--wheel-dir",
            )
            done = subprocess.run(
                [sys.executable, *words, str(folder), "."],
                cwd=ROOT, env=kept, capture_output=True, text=True, check=False, timeout=500,
            )  # fmt: skip
            assert done.returncode == 0, done.stdout + done.stderr
            built = list(folder.glob("*.whl"))
    (one,) = built
    return one
