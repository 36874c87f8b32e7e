"""What is around one life of a model: limits, mounts, users, neighbours."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from psi_kv_governor.sandbox.sandbox import Sandbox
from psikv_bench.host import MIB, neighbour

NOBODY = "54321"
"""A user number without name, home or group, as a container platform gives out."""


@dataclass
class Around:
    """What is around one run."""

    folder: Path
    """Its own, which any user can enter and write to; on a disk."""
    need_bytes: int
    """What plain llama.cpp takes of anonymous memory with this model and context."""
    cache_bytes: int
    ending: contextlib.ExitStack
    wrap: Callable[[list[str]], list[str]] = lambda argv: argv
    environ: dict[str, str] = field(default_factory=dict)
    sandbox: Sandbox | None = None
    other: Sandbox | None = None
    """Where the neighbour is, if not in the same."""
    neighbour: list[str] | None = None
    beside: list[str] = field(default_factory=list)
    """The neighbour, where the model has to start it itself: on a whole machine."""
    locks: bool = False
    during: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext
    """What happens while it decodes."""
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def short_bytes(self) -> int:
        """A limit that lacks half of the cache beside a neighbour of 100 MiB, which has 10 MiB of its own."""
        return self.need_bytes + 110 * MIB - self.cache_bytes // 2

    def limited(self, n_bytes: int, **swap: Any) -> None:
        """In a memory cgroup of so many bytes."""
        self.sandbox = self.ending.enter_context(Sandbox(n_bytes, **swap))

    def ramp(self, mib: int, mib_per_s: float) -> None:
        """A neighbour that takes memory and goes on using it."""
        rate = mib_per_s * MIB
        self.neighbour = neighbour("ramp", mib * MIB, rate_mib_s=rate / MIB)

    def mounts(self, *commands: str) -> None:
        """In a mount namespace of its own, in which `commands` were run."""
        script = " && ".join((*commands, 'exec "$@"'))
        before = self.wrap
        self.wrap = lambda argv: [
            "unshare", "-m", "--propagation", "private", "sh", "-c", script, "sh", *before(argv),
        ]  # fmt: skip

    def nobody(self) -> None:
        """As a user without a name."""
        before = self.wrap
        self.wrap = lambda argv: [
            "setpriv", "--reuid", NOBODY, "--regid", "0", "--clear-groups", *before(argv),
        ]  # fmt: skip
