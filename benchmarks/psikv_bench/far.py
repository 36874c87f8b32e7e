"""A context many times longer than what may stay in memory: how much of it can still be asked for.

The capacity scene with `--needles`. At no time are more than `--live` cells looked at, and the part of the
prompt that is just read; what is over it is parked, and recall brings back what a question needs. With a
limit that part is a process of its own, `python -m psikv_bench.far OPTIONS`, in a memory cgroup that need not
hold the whole context.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Annotated

import msgspec
from msgspec import Meta

from psi_kv_governor.cache import Recall
from psi_kv_governor.children import python_command, reason
from psi_kv_governor.errors import PsiKvError
from psi_kv_governor.sandbox.load import MIB
from psi_kv_governor.sandbox.sandbox import Sandbox
from psikv_bench.fidelity.contenders import WithRecall
from psikv_bench.fidelity.likelihood import Tick
from psikv_bench.fidelity.retrieval import Haystack, ask, haystack
from psikv_bench.fidelity.subject import Subject, recall_of
from psikv_bench.fidelity.tasks import Counts
from psikv_bench.figures import Asked, Figure, figure
from psikv_bench.messages import Setup
from psikv_bench.options import Options
from psikv_bench.process_memory import peak_bytes

FOUND = Asked(">=", 0.8)
"""Of the facts that the model itself finds at that length."""
_TEXT = "reference"
_SPARE_CELLS = 256
_DECODED = 16


class FarOptions(Options, frozen=True, kw_only=True):
    """How far, and with how much of it."""

    limits: Annotated[
        tuple[Annotated[int, Meta(ge=16)], ...],
        Meta(description="MiB of the cgroups [what the model takes, and 24, 48, 96 more]."),
    ] = ()
    chunk: Annotated[int, Meta(ge=1, description="Tokens of the prompt decoded at once.")] = 128
    needles: Annotated[int, Meta(ge=0, le=12, description="Facts hidden in --times the --live cells.")] = 0
    live: Annotated[int, Meta(ge=64, description="Cells that may be looked at, with --needles.")] = 512
    times: Annotated[int, Meta(ge=2, description="So many times longer is the context.")] = 16
    seed: Annotated[int, Meta(ge=0, description="Of what is hidden.")] = 0

    @property
    def text_tokens(self) -> int:
        """Of the text."""
        return self.live * self.times


class _Reader(Subject):
    """Reads with a budget of live cells."""

    def __init__(self, far: FarOptions) -> None:
        threads = far.threads or 1
        setup = Setup(variant="psi", model=far.model, auto=False, threads=threads, prefill_threads=threads)
        self.policy = WithRecall()
        super().__init__(setup, [self.policy], far.text_tokens + _SPARE_CELLS)
        self.hay: Haystack = haystack(self, _TEXT, Counts(needles=far.needles), far.text_tokens, far.seed)

    def read_within(self, live: int, chunk: int) -> None:
        """Read the text, and park what is over `live` cells after each chunk."""
        self.engine.recall(recall_of(self.config, "follow", paused=True))
        for start in range(0, len(self.hay.tokens), chunk):
            self.read(self.hay.tokens[start : start + chunk])
            if (over := self.sequence().live_cells - live) > 0:
                self.mask(self.chosen(self.policy, over))

    def answers(self) -> list[bool]:
        """Which questions are answered, each from the same end of the text."""
        return [ask(self, one) for one in self.hay.asked]

    def token_s(self) -> list[float]:
        """Seconds of each of a few tokens, decoded one by one and forgotten again."""
        mark, seconds = self.mark(), []
        for token in self.hay.tokens[:_DECODED]:
            began_s = time.perf_counter()
            self.read([token])
            seconds.append(time.perf_counter() - began_s)
        self.back_to(mark)
        return seconds


def measure(far: FarOptions, say: Tick) -> list[Figure]:
    """Hide, read, ask: with the whole context, then within the budget without recall and with it.

    Raises BadInputError where that is longer than the model was trained for, PsiKvError where the budget
    leaves nothing to exchange, or what is read within it does not live in its cgroup.
    """
    if len(far.limits) > 1:
        raise PsiKvError("with --needles one limit is played: give one with --limits, or none")
    with _Reader(far) as reader:
        protected = reader.config.sink_cells + reader.config.window_cells
        if far.live <= protected:
            raise PsiKvError(f"{protected} cells are protected: give more than that with --live")
        say(f"reading {far.text_tokens:,} tokens, all of them live")
        reader.load(reader.hay.tokens)
        whole, whole_s = reader.answers(), reader.token_s()
    say(f"reading {far.text_tokens:,} tokens within {far.live} live cells, and asking")
    found = _in_a_cgroup(far, whole) if far.limits else within(far, whole)
    return [
        figure("facts hidden", "times", [float(far.needles)]),
        figure("found with the whole context", "times", [float(sum(whole))]),
        *found,
        figure("decoding with the whole context", "tokens/s", [1.0 / one for one in whole_s]),
    ]


def within(far: FarOptions, whole: Sequence[bool]) -> list[Figure]:
    """Read the text within the budget and ask, in this process, what was found with the `whole` context."""
    with _Reader(far) as reader:
        began_s = time.perf_counter()
        reader.read_within(far.live, far.chunk)
        read_s = time.perf_counter() - began_s
        budget_bytes = far.live * reader.cell_bytes
        resident = reader.cache().resident_bytes / budget_bytes
        figures = [
            figure("context over live cells", "x", [far.text_tokens / reader.sequence().live_cells]),
            figure("resident cache over what the live cells take", "x", [resident]),
            figure("the whole context would take", "MB", [far.times * budget_bytes / 1e6]),
            figure("prompt within the budget", "tokens/s", [far.text_tokens / read_s]),
        ]
        reader.engine.recall(Recall())
        without = reader.answers()
        before = reader.engine.recalled().read_bytes
        with reader.recalling(reader.policy):
            recalled, token_s = reader.answers(), reader.token_s()
        read_mb = (reader.engine.recalled().read_bytes - before) / 1e6
    return [
        *figures,
        figure("of these without recall", "share", [_of(whole, without)]),
        figure("of these with recall", "share", [_of(whole, recalled)], FOUND),
        figure("read for a question", "MB", [read_mb / far.needles]),
        figure("decoding within the budget, with recall", "tokens/s", [1.0 / one for one in token_s]),
    ]


def _in_a_cgroup(far: FarOptions, whole: Sequence[bool]) -> list[Figure]:
    (limit_mib,) = far.limits
    with Sandbox(limit_mib * MIB) as sandbox:
        asked = (msgspec.json.encode(one).decode() for one in (far, whole))
        child = sandbox.popen(
            python_command(__name__, *asked), stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        said, problem = child.communicate()
        if sandbox.group.oom_kills():
            raise PsiKvError(
                f"the kernel killed it: {limit_mib} MiB do not hold the model and {far.live} cells"
            )
        if child.returncode:
            raise PsiKvError(f"the text can't be read within {limit_mib} MiB: {reason(problem)}")
        charged_bytes = peak_bytes(sandbox.group)
    return [
        figure("limit of the cgroup", "MB", [limit_mib * MIB / 1e6]),
        figure("most that was charged to it", "MB", [charged_bytes / 1e6]),
        *msgspec.json.decode(said, type=list[Figure]),
    ]


def _of(whole: Sequence[bool], others: Sequence[bool]) -> float:
    """Share of what the whole context gives that the others give too; 0 where it gives nothing."""
    return sum(a and b for a, b in zip(whole, others, strict=True)) / max(1, sum(whole))


if __name__ == "__main__":
    options = msgspec.json.decode(sys.argv[1], type=FarOptions)
    print(msgspec.json.encode(within(options, msgspec.json.decode(sys.argv[2]))).decode())
