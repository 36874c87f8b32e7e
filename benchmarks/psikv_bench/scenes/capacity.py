"""The longest context that survives under a memory limit, with a fixed cache and governed."""

from __future__ import annotations

import time
from functools import partial
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from psi_kv_governor.errors import BadInputError, PsiKvError
from psi_kv_governor.quantile import quantile
from psikv_bench import messages
from psikv_bench.capacity_report import (
    CLAIMED,
    Ending,
    Probe,
    best_table,
    figures,
    notes,
    plot,
    too_slow,
)
from psikv_bench.far import FarOptions, measure
from psikv_bench.host import MIB, Host, ModelKilledError
from psikv_bench.journal import Journal
from psikv_bench.messages import Setup, Variant
from psikv_bench.options import each_once, in_order
from psikv_bench.process_memory import peak_bytes
from psikv_bench.record import Recorder, Report, Say
from psikv_bench.scene import Scene
from psikv_bench.search import largest
from psikv_bench.trials.sizing import ample_bytes, require_sandbox
from psikv_bench.worker import Worker

STEP_CELLS = 256
"""Lengths are multiples of this: llama.cpp pads a context to it."""
THRASH_SHARE = 0.1
"""Of the tokens per second with a short context and memory to spare. Slower than that, a cgroup reads the
weights again for every token: the demo model then does 4 tokens per second from a fast disk, and next to none
from a memory card. Attending to a context of 8,192 tokens alone leaves it a fifth."""
EXTRA_MIB = (24, 48, 96)
"""For the cache, above what the model itself takes: hardly any, some, and twice that."""
NO_LIMIT = 0
"""Limit of the probe in peace, which all others are held against."""
_OPEN_S = 120.0
_ANY_PACE = 1e-3


class CapacityOptions(FarOptions, frozen=True, kw_only=True):
    """What is asked for."""

    variants: Annotated[tuple[Variant, ...], Meta(description="Which of them.")] = ("fixed", "psi")
    max_ctx: Annotated[int, Meta(ge=1, description="No longer context is tried.")] = 32_768
    tokens: Annotated[int, Meta(ge=1, lt=STEP_CELLS, description="Decoded at the end of each.")] = 32
    least_tokens_s: (
        Annotated[
            float, Meta(gt=0, description="What comes slower has not survived [0.1 of its calm speed].")
        ]
        | None
    ) = None
    resolution: Annotated[float, Meta(gt=1, description="Factor between the longest and what fails.")] = 1.15

    def check(self) -> None:
        each_once("variants", self.variants)


class Prober:
    """Probes lengths, each in a cgroup and a process of its own. What was probed is not probed again."""

    def __init__(self, options: CapacityOptions, journal: Journal[Probe], say: Say) -> None:
        self._options, self._journal, self._say = options, journal, say

    def compare(self, limit_bytes: int) -> None:
        """All variants under one limit: each begins where the one before ends."""
        best = 4 * STEP_CELLS
        for variant in in_order(self._options.variants):
            best = largest(
                partial(self._survives, variant, limit_bytes),
                max(STEP_CELLS, best),
                step=STEP_CELLS,
                most=self._options.max_ctx,
                resolution=self._options.resolution,
            )

    def _survives(self, variant: Variant, limit_bytes: int, length: int) -> bool:
        return self.probe(variant, limit_bytes, length).survived

    def probe(self, variant: Variant, limit_bytes: int, length: int) -> Probe:
        """One probe, from the journal where it is there.

        Raises PsiKvError where the model can't even be run with memory to spare.
        """
        for done in self._journal.parts:
            if (done.variant, done.limit_bytes, done.length) == (variant, limit_bytes, length):
                return done
        where = "memory to spare" if limit_bytes == NO_LIMIT else f"{limit_bytes // MIB} MiB"
        self._say(f"{where}, {variant}, {length:,} tokens", new=True)
        least_tokens_s = self._options.least_tokens_s if limit_bytes != NO_LIMIT else None
        found = _Probing(self._options, least_tokens_s or _ANY_PACE).play(variant, limit_bytes, length)
        if limit_bytes == NO_LIMIT and not found.survived:
            raise PsiKvError(f"the model cannot be run here: {found.why}")
        self._journal.add(found)
        return found


class _SlowError(PsiKvError):
    """What came, came slower than asked."""


_ENDINGS: dict[type, Ending] = {ModelKilledError: "killed", _SlowError: "slow"}


class _Probing:
    """One probe while it runs."""

    def __init__(self, options: CapacityOptions, least_tokens_s: float) -> None:
        self._options, self._least_tokens_s = options, least_tokens_s
        self._tokens: list[messages.Token] = []
        self._heard_s = time.monotonic()

    def play(self, variant: Variant, limit_bytes: int, length: int) -> Probe:
        """All of it."""
        ending: Ending = "survived"
        why, looked = "", None
        options = self._options
        setup = Setup(
            variant=variant,
            model=options.model,
            context_cells=length,  # all of them are used: plain llama.cpp pays for each
            batch_tokens=options.chunk,
            threads=options.threads or 1,
            prefill_threads=options.threads or 1,
        )
        with Host(setup, limit_bytes or ample_bytes()) as host:
            try:
                self._until(host, messages.Opened)
                host.order(Worker.fill, tokens=length - options.tokens, chunk=options.chunk)
                self._until(host, messages.Done)
                host.order(Worker.decode, tokens=options.tokens)
                self._until(host, messages.Done)
                host.order(Worker.look)
                looked = self._until(host, messages.Looked)
            except BadInputError:
                raise
            except PsiKvError as error:
                ending, why = _ENDINGS.get(type(error), "failed"), str(error)
            assert host.sandbox is not None, "it has a limit"
            charged_bytes = peak_bytes(host.sandbox.group)
        singles_s = [token.seconds for token in self._tokens if token.tokens == 1]
        chunks = [token for token in self._tokens if token.tokens > 1]
        chunks_s = sum(token.seconds for token in chunks)
        return Probe(
            variant=variant,
            limit_bytes=limit_bytes,
            length=length,
            ending=ending,
            why=why,
            done_tokens=sum(token.tokens for token in self._tokens),
            prompt_tokens_per_s=sum(token.tokens for token in chunks) / chunks_s if chunks else None,
            tokens_per_s=1.0 / quantile(singles_s, 0.5) if singles_s else None,
            peak_bytes=charged_bytes,
            live_cells=0 if looked is None else looked.live_cells,
            masked_cells=0 if looked is None else looked.masked_cells,
            lost_cells=0 if looked is None else looked.lost_cells,
        )

    def _until(self, host: Host, kind: type[Any]) -> Any:
        """Wait for a message. A chunk that does not come in its time is as slow as one that came late."""
        self._heard_s = time.monotonic()
        found = None
        while found is None:
            for message in host.hear(0.2):
                if isinstance(message, messages.Token):
                    self._heard_s = time.monotonic()
                    self._tokens.append(message)
                found = message if isinstance(message, kind) else found
            if found is None:
                host.check_alive()
                self._check_pace(time.monotonic() - self._heard_s)
        return found

    def _check_pace(self, silent_s: float) -> None:
        """Raises _SlowError."""
        least = self._least_tokens_s
        if not self._tokens:
            if silent_s > _OPEN_S:
                raise _SlowError(f"it did not open in {_OPEN_S:.0f} s")
        elif too_slow(self._tokens, silent_s, self._options.tokens, self._options.chunk, least):
            raise _SlowError(f"less than {least:g} tokens per second")


def run(recorder: Recorder[CapacityOptions]) -> Report:
    """Probe what is not yet in the journal, and report. Ctrl-C keeps the finished probes."""
    asked = recorder.options
    if asked.limits or not asked.needles:
        require_sandbox("none")
    if asked.needles:
        return recorder.save(recorder.report(measure(asked, recorder.say), [asked.threads or 1]))
    journal = recorder.journal(Probe, msgspec.structs.replace(asked, model=""))
    interrupted = False
    try:
        peace = Prober(asked, journal, recorder.say).probe("fixed", NO_LIMIT, STEP_CELLS)
        asked = _completed(asked, peace, quick=recorder.quick)
        for limit_mib in asked.limits:
            Prober(asked, journal, recorder.say).compare(limit_mib * MIB)
    except KeyboardInterrupt:
        interrupted = True
    probes = [probe for probe in journal.parts if probe.limit_bytes != NO_LIMIT]
    if not probes:
        raise PsiKvError("interrupted before the first probe was finished: there is nothing to report")
    report = recorder.report(
        # The short form ends at a length that says little about the gain.
        list(figures(probes, None if recorder.quick else CLAIMED)),
        [asked.threads or 1],
        options={"completed": asked},
        interrupted=interrupted,
        tables=[best_table(probes)],
        notes=notes(asked.chunk, asked.tokens, asked.least_tokens_s or 0.0),
        rows=probes,
    )
    lines = [msgspec.structs.asdict(probe) for probe in probes]
    return recorder.save(report, lines, lambda folder: plot(folder, probes))


def _completed(asked: CapacityOptions, peace: Probe, *, quick: bool) -> CapacityOptions:
    """What was asked for, with what was left to the model's own need and speed.

    Raises PsiKvError where the kernel keeps no peak to work the limits out from.
    """
    limits = asked.limits
    if not limits:
        if not peace.peak_bytes:
            raise PsiKvError("this kernel keeps no peak of a cgroup: give the limits with --limits")
        limits = auto_limits(peace.peak_bytes)[: 1 if quick else None]
    least = asked.least_tokens_s or THRASH_SHARE * (peace.tokens_per_s or 0.0)
    return msgspec.structs.replace(asked, limits=limits, least_tokens_s=least)


def auto_limits(need_bytes: int) -> tuple[int, ...]:
    """Limits in MiB above what the model takes, in whole steps of 8."""
    return tuple(-(-(need_bytes + extra * MIB) // (8 * MIB)) * 8 for extra in EXTRA_MIB)


SCENE = Scene(
    about="""Doubles and bisects the length of a context, each in a cgroup and a process of its own.

    A governed context is not wholly attended to: the table says how much of it is.
    """,
    options=CapacityOptions(),
    quick=CapacityOptions(max_ctx=4096, resolution=2.0, tokens=8),
    run=run,
    examples=(
        "psi-kv bench capacity --quick",
        "psi-kv bench capacity --limits 176,200,248 --out-dir capacity",
        "psi-kv bench capacity --needles 8 --live 496 --times 16 --threads 1",
        "psi-kv bench capacity --needles 8 --live 496 --times 16 --threads 1 --limits 112",
    ),
)
