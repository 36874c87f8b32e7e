"""Plays the same requests through each framework, and prints what came of it as JSON, a line a framework.

    python tests/frameworks/play.py governed MODEL [NAME ...]

`governed` imports `psi_kv_governor.auto` first, and has the caches parked before, while and after the second
request is answered; `plain` does without us altogether. Both must print the same answers and logits.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import json
import sys
import threading
import traceback
from collections.abc import Iterator
from typing import Any

from subjects import HANDED_ON, SUBJECTS

FIRST = (
    "A language model shares its memory with everything else. When the machine runs short, the kernel "
    "knows first: pressure stall information says how long tasks stood still for want of memory. The "
    "governor reads it, has the cache give memory back to the operating system, keeps the model answering, "
    "and puts the context back, bit for bit, when the pressure is over. Whatever anybody reads from the "
    "cache, at whatever moment, is what was written there."
)
PROMPTS = (FIRST, FIRST + " Then it says what", FIRST + " Then it says what to do. In other words")


def main() -> None:
    governed, path, names = sys.argv[1] == "governed", sys.argv[2], sys.argv[3:]
    governor = None
    if governed:
        from psi_kv_governor import auto

        governor = auto.governor
    for name in names or SUBJECTS:
        try:
            found = _play(SUBJECTS[name], path, governor)
        except Exception:
            found = {"error": traceback.format_exc(limit=6)}
        print(json.dumps({"name": name, **found}), flush=True)
        gc.collect()


def _play(open_: Any, path: str, governor: Any) -> dict[str, Any]:
    with contextlib.ExitStack() as ends:
        complete, llm = open_(path, ends)
        HANDED_ON.clear()
        answers = [(complete(PROMPTS[0]), _logits(llm))]
        _park(governor)
        with _parked_over_and_over(governor) as returned:
            answers.append((complete(PROMPTS[1]), _logits(llm)))
            returned.append(_park(governor))
        answers.append((complete(PROMPTS[2]), _logits(llm)))
        _mask(governor)
        last = complete(PROMPTS[2] + " and more"), _logits(llm)
        said = dict(governor.last_result) if governor is not None else None
        if llm is not None:
            llm.close()
    return {
        "answers": answers,
        "returned": sum(returned),
        "last": last,
        "said": said,
        "handed_on": HANDED_ON[-1] if HANDED_ON else None,
    }


def _logits(llm: Any) -> str | None:
    """A digest of the logits of the last token."""
    if llm is None:
        return None
    import llama_cpp
    import numpy as np

    row = llama_cpp.llama_get_logits_ith(llm.ctx, -1)
    return hashlib.sha256(np.ctypeslib.as_array(row, (llm.n_vocab(),)).tobytes()).hexdigest()[:16]


def _steps(governor: Any, verb: str, **more: Any) -> int:
    from psi_kv_governor.cache import Plan, Step, Verb

    steps = tuple(
        Step(verb=Verb[verb], cache=cache.id, sequence=sequence.id, **more)
        for cache in governor.engine.snapshot().caches
        for sequence in cache.sequences
    )
    result = governor.engine.apply(Plan(steps=steps))
    return result.masked if verb == "MASK" else result.bytes_returned


def _park(governor: Any) -> int:
    return _steps(governor, "PARK") if governor is not None else 0


@contextlib.contextmanager
def _parked_over_and_over(governor: Any) -> Iterator[list[int]]:
    over = threading.Event()
    returned: list[int] = []

    def run() -> None:
        while governor is not None and not over.wait(0.005):
            returned.append(_park(governor))

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield returned
    finally:
        over.set()
        thread.join()


def _mask(governor: Any) -> None:
    if governor is not None:
        from psi_kv_governor.cache import Range

        assert _steps(governor, "MASK", ranges=(Range(10, 60),)) == 50


if __name__ == "__main__":
    main()
