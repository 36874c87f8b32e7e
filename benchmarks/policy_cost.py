"""`psi-kv bench policies` as a script: what scoring and sampling cost, over one decoded token.

Takes the same options. What is kept is its full form: `--out benchmarks/results/policies.json`.
"""

from __future__ import annotations

import sys

from psi_kv_governor.cli import main

if __name__ == "__main__":
    main(["bench", "policies", *sys.argv[1:]])
