"""`psi-kv bench overhead` as a script: decode speed on a calm machine against plain llama_cpp.Llama.

Takes the same options. What is kept is its full form: `--out benchmarks/results/overhead.json`.
"""

from __future__ import annotations

import sys

from psi_kv_governor.cli import main

if __name__ == "__main__":
    main(["bench", "overhead", *sys.argv[1:]])
