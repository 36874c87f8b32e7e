"""What of vLLM is used without being promised: each with a look whether it is there as it is known here.

Where one is not, a capability is off and says why. Nothing of vLLM's code is replaced but one method, that of
the engine's loop, which is called as it was: from it the queue is known that wakes an idle engine.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from typing import Any

FAR = sys.maxsize
"""A step that never comes."""


# -- standing still ----------------------------------------------------------------------------------------


def why_no_hold() -> str:
    """Why a running request can't be made to stand still; '' where it can.

    The scheduler passes over a running request until its `next_decode_eligible_step`; so asked, it keeps its
    blocks, its place and its state in the workers. vLLM uses it to space the steps of pipelines.
    """
    try:
        from vllm.v1.core.sched.scheduler import Scheduler
        from vllm.v1.request import Request
    except ImportError as error:
        return f"this vLLM has no scheduler that is known here ({error})"
    names = getattr(getattr(Scheduler.schedule, "__code__", None), "co_names", ())
    made = getattr(getattr(Request.__init__, "__code__", None), "co_names", ())
    if "next_decode_eligible_step" not in names or "next_decode_eligible_step" not in made:
        return "this vLLM's scheduler passes over no running request (next_decode_eligible_step)"
    return ""


def hold(request: Any, still: bool) -> None:
    """Have the scheduler pass over a running request, or not any more."""
    request.next_decode_eligible_step = FAR if still else 0


# -- the block pool ----------------------------------------------------------------------------------------


def why_no_free_list(pool: Any) -> str:
    """Why it can't be told which blocks are free and cached; '' where it can."""
    queue = getattr(pool, "free_block_queue", None)
    if not callable(getattr(queue, "get_all_free_blocks", None)):
        return "this vLLM's block pool has no list of free blocks (free_block_queue.get_all_free_blocks)"
    block = next(iter(getattr(pool, "blocks", ())), None)
    if block is None or not (hasattr(block, "block_id") and hasattr(block, "block_hash")):
        return "this vLLM's blocks have no number or hash (block_id, block_hash)"
    return ""


def free_list(pool: Any) -> Iterator[tuple[int, bool]]:
    """The free blocks, the least recently used first: number, and whether a hash finds it."""
    for block in pool.free_block_queue.get_all_free_blocks():
        if not getattr(block, "is_null", False):
            yield block.block_id, block.block_hash is not None


# -- waking ------------------------------------------------------------------------------------------------


class Waker:
    """Ends the sleep of an idle engine, so that it makes a step without a request."""

    def __init__(self) -> None:
        self._queue: Any = None
        self._wakeup: Any = None
        self.why_not = self._install()
        """Why an idle engine can't be woken; '' where it can."""

    def _install(self) -> str:
        core: Any = sys.modules.get("vllm.v1.engine.core")
        kinds: Any = sys.modules.get("vllm.v1.engine")
        loop: Any = getattr(core, "EngineCoreProc", None)
        self._wakeup = getattr(getattr(kinds, "EngineCoreRequestType", None), "WAKEUP", None)
        if self._wakeup is None or not callable(getattr(loop, "run_busy_loop", None)):
            return "this vLLM's engine can't be woken from outside (EngineCoreRequestType.WAKEUP)"
        original = loop.run_busy_loop

        @functools.wraps(original)
        def run_busy_loop(engine: Any) -> Any:
            self._queue = getattr(engine, "input_queue", None)
            return original(engine)

        loop.run_busy_loop = run_busy_loop
        return ""

    def __call__(self) -> None:
        """Wake it. Does nothing where it is awake, or has no loop of its own."""
        if self._queue is not None and self._queue.empty():
            self._queue.put_nowait((self._wakeup, None))
