"""How this package starts itself again, and other Python programs, and why they ended."""

from __future__ import annotations

import sys
from pathlib import Path

_RUN = """\
import runpy, sys
sys.path.insert(1, sys.argv.pop(1))
runpy.run_module(sys.argv.pop(1), run_name="__main__", alter_sys=True)
"""


def python_command(module: str, *arguments: str) -> list[str]:
    """The command that runs `module` with `arguments` in isolated mode.

    `python -m` looks into the working directory first: a `msgspec.py` that lies there would be run, and a
    benchmark's children run as root. Isolated mode (-I) leaves out the working directory, PYTHONPATH and the
    user's site folder; where this package is not installed but found on a path, that path is handed over.
    """
    folder = Path(__file__).resolve().parents[1]
    if folder.name in {"site-packages", "dist-packages"}:
        return [sys.executable, "-I", "-m", module, *arguments]
    return [sys.executable, "-I", "-c", _RUN, str(folder), module, *arguments]


def reason(errors: bytes) -> str:
    """The last line of what a child said on standard error: why it ended."""
    lines = errors.decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else "no message"
