"""How the agent is compiled: one place for the build of a wheel and for the first use without one.

Nothing but the standard library is imported here: the build of a wheel loads this file alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

SOURCE_DIR = Path(__file__).parents[1] / "engines" / "llama" / "agent"
# Sums may be taken in any order, so that they are taken 8 or 16 at a time. Not -ffast-math: linked with it, a
# library makes the whole process flush subnormals to zero, and llama.cpp's logits would change.
_SUMS = ("-fassociative-math", "-fno-signed-zeros", "-fno-trapping-math", "-fno-math-errno")
FLAGS = ("-std=gnu11", "-O3", "-shared", "-fPIC", "-fvisibility=hidden", "-fexceptions", *_SUMS)


def compile_command(compiler: Sequence[str], target: str) -> list[str]:
    """The command that makes the agent into the library `target`; `compiler` may be several words."""
    sources = map(str, sorted(SOURCE_DIR.glob("*.c")))
    return [*compiler, *FLAGS, *sources, "-o", target, "-ldl", "-lm", "-lpthread"]
