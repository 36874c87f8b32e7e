"""`psi-kv bench oom` as a script: kills by ramp of a neighbour, fixed and governed.

Takes the same options. What is kept is its full form: `--runs 1000 --out-dir data/bench-pressure/oom`.
"""

from __future__ import annotations

import sys

from psi_kv_governor.cli import main

if __name__ == "__main__":
    main(["bench", "oom", *sys.argv[1:]])
