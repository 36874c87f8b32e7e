"""The model whose life is looked at: plain or governed, the same work in both.

    python -m psikv_bench.survival.subject '{"variant": "psi", ...}'

Says `ready` when its context is there, decodes while others do what they do when it is sent a line, says
`decoded`, and after a second line what it is when all is calm again. A JSON line each.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import msgspec

from psi_kv_governor.sandbox.llm import greedy, put_back
from psikv_bench import llm as states
from psikv_bench.messages import Setup, Variant

CALM_TOKENS = 8
_BACK_S = 20.0
"""How long it is tried to have all back once the others are gone."""


class Order(msgspec.Struct, frozen=True, kw_only=True):
    """What is to be done."""

    variant: Variant
    model: str
    state: str
    """File with the context."""
    context: list[int]
    cells: int
    tokens: int
    """Decoded while the others are there."""
    locks: bool = False
    """Whether all memory is locked once the context is there."""
    settings: dict[str, Any] = {}
    beside: list[str] = []
    """The neighbour, where it has to be started from within: it is ended when the tokens are there."""


class Said(msgspec.Struct, frozen=True, kw_only=True):
    """A line."""

    event: str
    tokens: list[int] = []
    seconds: float = 0.0
    masked: int = 0
    """Of its cells, those that some of the tokens were decoded without: it is told with the result."""
    returned_bytes: int = 0
    ungoverned: str = ""
    """Why nothing of it can be given up."""


def main() -> None:
    """Entry point of the process."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    order = msgspec.json.decode(sys.argv[1], type=Order)
    setup = Setup(
        variant=order.variant,
        model=order.model,
        mmap=False,
        settings=order.settings,
        context_cells=order.cells,
        prefill_threads=1,
    )
    llm = states.opened(setup)
    governed = setup.governed
    returned: list[int] = []
    if governed:
        llm.governor.subscribe(lambda event: returned.append(getattr(event, "bytes_returned", 0)))
    states.load_state(llm, order.state, order.context[:-1])
    llm.eval(order.context[-1:])
    _say(Said(event="ready", ungoverned=states.why_not_governable(llm) if governed else ""))
    if order.locks:
        ctypes.CDLL(None).mlockall(1)  # MCL_CURRENT
    sys.stdin.readline()
    with _beside(order.beside) as all_taken:
        last, masked = False, 0
        while not last:
            last = all_taken()
            began_s, tokens, most = time.monotonic(), *_decoded(llm, order, order.tokens)
            seconds, masked = time.monotonic() - began_s, max(masked, most)
            if not last:
                _from_the_end(llm, order)
    given = sum(returned)
    _say(Said(event="decoded", tokens=tokens, seconds=seconds, masked=masked, returned_bytes=given))
    sys.stdin.readline()
    _say(Said(event="calm", tokens=_again(llm, order, governed)))
    llm.close()


@contextlib.contextmanager
def _beside(argv: list[str]) -> Iterator[Callable[[], bool]]:
    """The neighbour; gives whether it holds all that it takes.

    Where memory is short that takes it longer than the tokens take: who is done before has not lived beside
    it. So they are decoded over and over until then."""
    if not argv:
        yield lambda: True
        return
    with subprocess.Popen(argv, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()  # it begins
        os.set_blocking(child.stdout.fileno(), False)
        said = [b""]

        def all_taken() -> bool:
            assert child.stdout is not None
            said[0] += child.stdout.read() or b""
            return b'"taken"' in said[0] or child.poll() is not None

        yield all_taken
        child.kill()


def _decoded(llm: Any, order: Order, count: int) -> tuple[list[int], int]:
    """The tokens, and the most cells that were masked meanwhile."""
    tokens, masked = [], 0
    for _ in range(count):
        tokens.append(greedy(llm))
        masked = max(masked, states.cells_of(llm, plain=order.variant == "fixed").masked)
        llm.eval(tokens[-1:])
    return tokens, masked


def _from_the_end(llm: Any, order: Order) -> None:
    """Back to the end of the context."""
    states.cut(llm, len(order.context) - 1)
    llm.eval(order.context[-1:])


def _again(llm: Any, order: Order, governed: bool) -> list[int]:
    """The first tokens once more, from the context as it was before: it is whole, or it is not."""
    until_s = time.monotonic() + _BACK_S
    while governed and put_back(llm) and time.monotonic() < until_s:
        time.sleep(0.2)
    _from_the_end(llm, order)
    return _decoded(llm, order, CALM_TOKENS)[0]


def _say(said: Said) -> None:
    with contextlib.suppress(BrokenPipeError):
        print(msgspec.json.encode(said).decode(), flush=True)


if __name__ == "__main__":
    main()
