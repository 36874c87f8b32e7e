"""`psi-kv bench opening` as a script: memory of a large context, before and while tokens come into it.

Takes the same options. What is kept is its full form: `--out benchmarks/results/opening.json`.
"""

from __future__ import annotations

import sys

from psi_kv_governor.cli import main

if __name__ == "__main__":
    main(["bench", "opening", *sys.argv[1:]])
