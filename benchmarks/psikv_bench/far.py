"""A context many times longer than what may stay in memory: how much of it can still be asked for.

The capacity scene with `--needles`. At no time are more than `--live` cells looked at, and the part of the
prompt that is just read; what is over it is parked, and recall brings back what a question needs. With a
limit that part is a process of its own, `python -m psikv_bench.far FAR`, in a memory cgroup that need not
hold the whole context.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

import msgspec

from psi_kv_governor.cache import Recall
from psi_kv_governor.children import python_command
from psi_kv_governor.errors import PsiKvError
from psi_kv_governor.sandbox.host import MIB
from psi_kv_governor.sandbox.messages import Setup
from psi_kv_governor.sandbox.sandbox import Sandbox
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


class Far(msgspec.Struct, frozen=True):
    """How far, and with how much of it."""

    model: str
    threads: int
    live: int
    times: int
    needles: int
    chunk: int
    seed: int
    limit_mib: int = 0
    """Of the cgroup for what is read within the budget; 0: none."""

    @classmethod
    def of(cls, options: Any) -> Far:
        """As the capacity scene was asked. Raises PsiKvError for more than one limit."""
        if len(options.limits) > 1:
            raise PsiKvError("with --needles one limit is played: give one with --limits, or none")
        names = ("model", "live", "times", "needles", "chunk", "seed")
        given = {name: getattr(options, name) for name in names}
        return cls(threads=options.threads or 1, limit_mib=sum(options.limits), **given)

    @property
    def tokens(self) -> int:
        """Of the text."""
        return self.live * self.times


class Within(msgspec.Struct, frozen=True, kw_only=True):
    """What came of reading and asking within the budget."""

    live: int
    """Cells at the end of the text."""
    resident_bytes: int
    """Of the cache."""
    budget_bytes: int
    """What the live cells take."""
    read_s: float
    without: list[bool]
    recalled: list[bool]
    """Which questions are answered, without recall and with it."""
    read_bytes: int
    """For all questions."""
    token_s: list[float]
    """Of tokens that are decoded one by one, with recall."""
    peak_bytes: int = 0
    """Of the cgroup."""


class _Reader(Subject):
    """Reads with a budget of live cells."""

    def __init__(self, far: Far) -> None:
        setup = Setup(
            variant="psi", model=far.model, auto=False, threads=far.threads, prefill_threads=far.threads
        )
        compared = contenders([RECALL], seed=0, seeds=1)
        super().__init__(setup, compared, far.tokens + _SPARE_CELLS)
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


def measure(far: Far, say: Tick) -> list[Figure]:
    """Hide, read, ask: with the whole context, then within the budget without recall and with it.

    Raises BadInputError where that is longer than the model was trained for, PsiKvError where the budget
    leaves nothing to exchange, or what is read within it does not live in its cgroup.
    """
    with _Reader(far) as reader:
        protected = reader.config.sink_cells + reader.config.window_cells
        if far.live <= protected:
            raise PsiKvError(f"{protected} cells are protected: give more than that with --live")
        hay = _haystack(reader, far)
        say(f"reading {far.tokens:,} tokens, all of them live")
        reader.load(hay.tokens)
        whole = reader.answers(hay.asked)
        whole_s = reader.token_s(hay.tokens[:_DECODED])
    say(f"reading {far.tokens:,} tokens within {far.live} live cells, and asking")
    found = _in_a_cgroup(far) if far.limit_mib else within(far)
    limited = [
        figure("limit of the cgroup", "MB", [far.limit_mib * MIB / 1e6]),
        figure("most that was charged to it", "MB", [found.peak_bytes / 1e6]),
    ]
    return [
        figure("context over live cells", "x", [far.tokens / found.live]),
        figure(
            "resident cache over what the live cells take", "x", [found.resident_bytes / found.budget_bytes]
        ),
        figure("the whole context would take", "MB", [far.times * found.budget_bytes / 1e6]),
        *(limited if far.limit_mib else ()),
        figure("facts hidden", "times", [float(far.needles)]),
        figure("found with the whole context", "times", [float(sum(whole))]),
        figure("of these without recall", "share", [_of(whole, found.without)]),
        figure("of these with recall", "share", [_of(whole, found.recalled)], FOUND),
        figure("read for a question", "MB", [found.read_bytes / 1e6 / far.needles]),
        figure("prompt within the budget", "tokens/s", [far.tokens / found.read_s]),
        figure("decoding within the budget, with recall", "tokens/s", [1.0 / one for one in found.token_s]),
        figure("decoding with the whole context", "tokens/s", [1.0 / one for one in whole_s]),
    ]


def within(far: Far) -> Within:
    """Read the text within the budget and ask, in this process."""
    with _Reader(far) as reader:
        hay = _haystack(reader, far)
        began_s = time.perf_counter()
        reader.read_within(hay.tokens)
        read_s = time.perf_counter() - began_s
        live, resident = reader.sequence().live_cells, reader.cache().resident_bytes
        reader.engine.recall(Recall())
        without = reader.answers(hay.asked)
        before = reader.engine.recalled().read_bytes
        with reader.recalling(reader.policy):
            recalled = reader.answers(hay.asked)
            token_s = reader.token_s(hay.tokens[:_DECODED])
        return Within(
            live=live,
            resident_bytes=resident,
            budget_bytes=far.live * reader.cell_bytes,
            read_s=read_s,
            without=without,
            recalled=recalled,
            read_bytes=reader.engine.recalled().read_bytes - before,
            token_s=token_s,
        )


def _in_a_cgroup(far: Far) -> Within:
    with Sandbox(far.limit_mib * MIB) as sandbox:
        command = python_command(__name__, msgspec.json.encode(far).decode())
        child = sandbox.popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        said, problem = child.communicate()
        if sandbox.group.oom_kills():
            raise PsiKvError(
                f"the kernel killed it: {far.limit_mib} MiB do not hold the model and {far.live} cells"
            )
        if child.returncode:
            why = (problem.decode(errors="replace").strip().splitlines() or ["no message"])[-1]
            raise PsiKvError(f"the text can't be read within {far.limit_mib} MiB: {why}")
        found = msgspec.json.decode(said, type=Within)
        return msgspec.structs.replace(found, peak_bytes=sandbox.group.peak_bytes() or 0)


def _haystack(reader: _Reader, far: Far) -> retrieval.Haystack:
    length = far.tokens
    options = FidelityOptions(policies=(RECALL,), texts=(_TEXT,), shares=(0.1,), ctx=(length,), seed=far.seed)
    planned = plan(options, reader.config, quick=True)
    planned = msgspec.structs.replace(
        planned, haystacks=1, haystack_tokens=length, counts=(Counts(needles=far.needles),)
    )
    return next(retrieval.haystacks(reader, planned))


def _of(whole: Sequence[bool], others: Sequence[bool]) -> float:
    """Share of what the whole context gives that the others give too; 0 where it gives nothing."""
    return sum(a and b for a, b in zip(whole, others, strict=True)) / max(1, sum(whole))


if __name__ == "__main__":
    print(msgspec.json.encode(within(msgspec.json.decode(sys.argv[1], type=Far))).decode())
