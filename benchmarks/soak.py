"""`psi-kv bench soak` as a script: what the governor itself costs, and whether anything grows.

Takes the same options. What is kept is an hour of it: `--repeats 120 --out data/bench/soak.json`.
"""

from __future__ import annotations

import sys

from psi_kv_governor.cli import main

if __name__ == "__main__":
    main(["bench", "soak", *sys.argv[1:]])
