"""`psi-kv bench fidelity` as a script: what the model still knows when part of its context is given up.

Takes the same options. What is kept is its full form: `--out-dir data/bench-fidelity`.
"""

from __future__ import annotations

import sys

from psi_kv_governor.cli import main

if __name__ == "__main__":
    main(["bench", "fidelity", *sys.argv[1:]])
