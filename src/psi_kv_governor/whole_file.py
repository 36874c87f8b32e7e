"""A file that is written whole or not at all."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO


@contextlib.contextmanager
def whole_file(path: Path, before: Callable[[], None] = lambda: None) -> Iterator[IO[bytes]]:
    """What is written to the file stands at `path` once the block ends well; else what was there stays.

    `before` is called when all is written, to put an earlier file aside. Raises OSError.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with partial.open("wb") as file:
            yield file
        before()
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
