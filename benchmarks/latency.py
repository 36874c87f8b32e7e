"""`psi-kv bench latency` as a script: from the first sign of need to the bytes returned.

Takes the same options. What is kept is its full form: `--out-dir data/bench-pressure/latency`.
"""

from __future__ import annotations

import sys

from psi_kv_governor.cli import main

if __name__ == "__main__":
    main(["bench", "latency", *sys.argv[1:]])
