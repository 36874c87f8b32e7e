"""`psi-kv bench trim` as a script: what a trim returns, and that nothing of the context changes.

Takes the same options. What is kept is its full form: `--out benchmarks/results/trim.json`.
"""

from __future__ import annotations

import sys

from psi_kv_governor.cli import main

if __name__ == "__main__":
    main(["bench", "trim", *sys.argv[1:]])
