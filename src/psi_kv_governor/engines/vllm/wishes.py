"""What the governor asks of an engine's blocks and requests, and what became of it."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

from psi_kv_governor.cache import Verb
from psi_kv_governor.engines.vllm.messages import Finished

PREFIXES = 0
"""Number of the sequence that stands for all cached blocks that no request uses."""


@dataclass
class Wish:
    """What the governor asks for, and what became of it."""

    verb: Verb
    sequence: int = PREFIXES
    n_bytes: int = 0
    positions: tuple[tuple[int, int], ...] = ()
    """Of a request that comes back: first and last position, exclusive."""
    done: Finished = field(default_factory=lambda: Finished(ranks=0))
    blocks: tuple[int, ...] = ()
    over: threading.Event = field(default_factory=threading.Event)

    def end(self, problem: str = "") -> None:
        """Nothing more comes of it."""
        if problem:
            self.done = self.done + Finished(problem=problem, ranks=0)
        self.over.set()
