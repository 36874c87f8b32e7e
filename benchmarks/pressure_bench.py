"""`psi-kv bench pressure` as a script: `python benchmarks/pressure_bench.py --help`. Same options."""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent

if __name__ == "__main__":
    sys.path[:0] = [str(HERE), str(HERE.parent / "src")]  # from a checkout that is not installed, too
    from psi_kv_governor.cli import main

    main(["bench", "pressure", *sys.argv[1:]])
