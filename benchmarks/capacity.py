"""`psi-kv bench capacity` as a script: the longest context that survives under a limit.

Takes the same options. What is kept is its full form: `--out-dir data/bench-pressure/capacity`.
"""

from __future__ import annotations

import sys

from psi_kv_governor.cli import main

if __name__ == "__main__":
    main(["bench", "capacity", *sys.argv[1:]])
