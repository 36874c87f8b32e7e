"""A context many times longer than what may stay in memory: how much of it can still be asked for.

The capacity scene with `--needles`. At no time are more than `--live` cells looked at, and the part of the
prompt that is just read; what is over it is parked, and recall brings back what a question needs.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from psi_kv_governor.cache import Recall
from psi_kv_governor.errors import PsiKvError
from psi_kv_governor.sandbox.messages import Setup
from psikv_bench.fidelity import retrieval
from psikv_bench.fidelity.contenders import RECALL, contenders
from psikv_bench.fidelity.likelihood import Tick
from psikv_bench.fidelity.plan import FidelityOptions, plan
from psikv_bench.fidelity.retrieval import Asked as Question
from psikv_bench.fidelity.subject import Subject
from psikv_bench.fidelity.tasks import Counts
from psikv_bench.figures import Asked, Figure, figure

FOUND = Asked(">=", 0.8)
"""Of the facts that the model itself finds at that length."""
_TEXT = "reference"
_SPARE_CELLS = 256
_DECODED = 16


@dataclass(frozen=True)
class Far:
    """How far, and with how much of it."""

    model: str
    threads: int
    live: int
    times: int
    needles: int
    chunk: int

    @classmethod
    def of(cls, options: Any) -> Far:
        """As the capacity scene was asked."""
        names = ("model", "live", "times", "needles", "chunk")
        return cls(threads=options.threads or 1, **{name: getattr(options, name) for name in names})


class _Reader(Subject):
    """Reads with a budget of live cells."""

    def __init__(self, far: Far) -> None:
        setup = Setup(
            variant="psi", model=far.model, auto=False, threads=far.threads, prefill_threads=far.threads
        )
        compared = contenders([RECALL], seed=0, seeds=1)
        super().__init__(setup, compared, far.live * far.times + _SPARE_CELLS)
        self.policy = compared[0].policies[0]
        self._far = far

    def read_within(self, tokens: Sequence[int]) -> None:
        """Read `tokens` from an empty context, and park what is over the budget after each chunk."""
        self.forget()
        self.engine.recall(Recall(mode="follow", paused=True, sink_cells=self.config.sink_cells))
        for start in range(0, len(tokens), self._far.chunk):
            self.read(tokens[start : start + self._far.chunk])
            if (over := self.sequence().live_cells - self._far.live) > 0:
                self.mask(self.chosen(self.policy, over))

    def answers(self, questions: Sequence[Question]) -> list[bool]:
        """Which of them are answered, each from the same end of the text."""
        found = []
        for one in questions:
            mark = self.mark()
            logits = self.asked(one.tokens[: one.stem], one.tokens[one.stem : -1])
            self.back_to(mark)
            found.append(one.right(logits, 0))
        return found

    def token_s(self, tokens: Sequence[int]) -> list[float]:
        """Seconds of each of `tokens`, decoded one by one and forgotten again."""
        mark, seconds = self.mark(), []
        for token in tokens:
            began_s = time.perf_counter()
            self.read([token])
            seconds.append(time.perf_counter() - began_s)
        self.back_to(mark)
        return seconds


def measure(far: Far, seed: int, say: Tick) -> list[Figure]:
    """Hide, read, ask: with the whole context, then within the budget without recall and with it.

    Raises BadInputError where that is longer than the model was trained for, PsiKvError where the budget
    leaves nothing to exchange.
    """
    with _Reader(far) as reader:
        protected = reader.config.sink_cells + reader.config.window_cells
        if far.live <= protected:
            raise PsiKvError(f"{protected} cells are protected: give more than that with --live")
        length = far.live * far.times
        hay = _haystack(reader, far, seed, length)
        say(f"reading {length:,} tokens, all of them live")
        reader.load(hay.tokens)
        whole = reader.answers(hay.asked)
        whole_s = reader.token_s(hay.tokens[:_DECODED])
        say(f"reading {length:,} tokens within {far.live} live cells")
        began_s = time.perf_counter()
        reader.read_within(hay.tokens)
        read_s = time.perf_counter() - began_s
        live, resident = reader.sequence().live_cells, reader.cache().resident_bytes
        reader.engine.recall(Recall())
        without = reader.answers(hay.asked)
        say("asking with recall")
        before = reader.engine.recalled()
        with reader.recalling(reader.policy):
            recalled = reader.answers(hay.asked)
            far_s = reader.token_s(hay.tokens[:_DECODED])
        read_bytes = reader.engine.recalled().read_bytes - before.read_bytes
        budget_bytes = far.live * reader.cell_bytes
        reader.unmask()
    return [
        figure("context over live cells", "x", [length / live]),
        figure("resident cache over what the live cells take", "x", [resident / budget_bytes]),
        figure("facts hidden", "times", [float(far.needles)]),
        figure("found with the whole context", "times", [float(sum(whole))]),
        figure("of these without recall", "share", [_of(whole, without)]),
        figure("of these with recall", "share", [_of(whole, recalled)], FOUND),
        figure("read for a question", "MB", [read_bytes / 1e6 / len(hay.asked)]),
        figure("prompt within the budget", "tokens/s", [length / read_s]),
        figure("decoding within the budget, with recall", "tokens/s", [1.0 / one for one in far_s]),
        figure("decoding with the whole context", "tokens/s", [1.0 / one for one in whole_s]),
    ]


def _haystack(reader: _Reader, far: Far, seed: int, length: int) -> retrieval.Haystack:
    options = FidelityOptions(policies=(RECALL,), texts=(_TEXT,), shares=(0.1,), ctx=(length,), seed=seed)
    planned = plan(options, reader.config, quick=True)
    planned = msgspec.structs.replace(
        planned, haystacks=1, haystack_tokens=length, counts=(Counts(needles=far.needles),)
    )
    return next(retrieval.haystacks(reader, planned))


def _of(whole: Sequence[bool], others: Sequence[bool]) -> float:
    """Share of what the whole context gives that the others give too; 0 where it gives nothing."""
    return sum(a and b for a, b in zip(whole, others, strict=True)) / max(1, sum(whole))
