"""A graph that stands still for as long as a test looks at what happens meanwhile."""

from __future__ import annotations

import threading

from torture import Context

from waiting import PATIENCE_S


class Pausing:
    """A callback of ggml that stops the graph in its middle, once, until it may go on."""

    def __init__(self, api) -> None:
        self.armed = False
        self.stopped, self.goes_on = threading.Event(), threading.Event()
        self.stands = False
        self.function = api.ggml_backend_sched_eval_callback(self._called)

    def decode(self, context: Context, at: int, n: int = 1) -> threading.Thread:
        """`n` more tokens of sequence 0, whose first graph stands still when this returns."""
        self.armed = True
        tokens = [(7, at + i, 0) for i in range(n)]
        decoding = threading.Thread(target=context.decode, args=(tokens,))
        decoding.start()
        assert self.stopped.wait(PATIENCE_S)
        return decoding

    def go_on(self, decoding: threading.Thread) -> None:
        """Let the graph end, and be ready for another one."""
        self.goes_on.set()
        decoding.join(PATIENCE_S)
        self.stopped.clear()
        self.goes_on.clear()

    def _called(self, _node, ask: bool, _user) -> bool:
        if self.armed and not ask:
            self.armed, self.stands = False, True
            self.stopped.set()
            self.goes_on.wait(PATIENCE_S)
            self.stands = False
        return True
