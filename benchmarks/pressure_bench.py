"""`psi-kv bench pressure` as a script: `PYTHONPATH=src python benchmarks/pressure_bench.py --help`.

Takes the same options.
"""

from __future__ import annotations

import sys

from psi_kv_governor.cli import main

if __name__ == "__main__":
    main(["bench", "pressure", *sys.argv[1:]])
