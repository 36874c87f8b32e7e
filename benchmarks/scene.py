"""`psi-kv bench scene` as a script: the demo's scene by turns, governed and not.

Takes the same options. What is kept is its full form: `--out benchmarks/results/scene.json`.
"""

from __future__ import annotations

import sys

from psi_kv_governor.cli import main

if __name__ == "__main__":
    main(["bench", "scene", *sys.argv[1:]])
