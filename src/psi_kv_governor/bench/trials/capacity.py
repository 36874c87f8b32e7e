"""The longest context that survives under a memory limit, with a fixed cache and governed."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from psi_kv_governor.bench.messages import Variant
from psi_kv_governor.bench.record import Say
from psi_kv_governor.bench.script import MIB
from psi_kv_governor.bench.trials import grow, messages
from psi_kv_governor.bench.trials.capacity_plan import (
    NO_LIMIT,
    STEP_CELLS,
    CapacityOptions,
    Ending,
    Probe,
)
from psi_kv_governor.bench.trials.host import Host, ModelKilledError
from psi_kv_governor.bench.trials.journal import Journal
from psi_kv_governor.bench.trials.oom_plan import NAMES
from psi_kv_governor.bench.trials.search import largest
from psi_kv_governor.bench.trials.sizing import roomy_bytes
from psi_kv_governor.errors import BadInputError, PsiKvError
from psi_kv_governor.events import Released, Trimmed

EXTRA_BYTES = (24 * MIB, 48 * MIB, 96 * MIB)
"""Room for the cache above what the model itself takes: hardly any, some, and twice that."""
_OPEN_S = 120.0
_ANY_PACE = 1e-3
_HEAR_S = 0.2


class _Slow(Exception):
    """What came, came slower than asked."""


class Prober:
    """Probes lengths, each in a pen and a process of its own. What the journal has is not probed again."""

    def __init__(self, model: Path, options: CapacityOptions, journal: Journal[Probe], say: Say) -> None:
        self._model, self._options, self._journal, self._say = model, options, journal, say

    def probe(self, variant: Variant, limit_bytes: int, length: int) -> Probe:
        """One probe, from the journal where it is there."""
        for done in self._journal.parts:
            if (done.variant, done.limit_bytes, done.length) == (variant, limit_bytes, length):
                return done
        what = f"{limit_bytes // MIB} MiB, {NAMES[variant]}, {length:,} tokens"
        found = _Probing(self._model, self._options, variant, limit_bytes, length).play(
            lambda done: self._say(f"{what}: {done:,} done")
        )
        self._journal.add(found)
        return found

    def search(self, variant: Variant, limit_bytes: int, start: int) -> int:
        """The longest that survives, to the asked resolution; 0 where none does."""
        return largest(
            lambda length: self.probe(variant, limit_bytes, length).ending == "survived",
            start,
            step=STEP_CELLS,
            most=self._options.most_tokens,
            resolution=self._options.resolution,
        ).best

    def compare_all(self) -> None:
        """Both variants under each limit."""
        for limit_bytes in self._options.limits_bytes:
            self.compare(limit_bytes)

    def compare(self, limit_bytes: int) -> None:
        """Both variants under one limit: the governed one begins where the fixed one ends."""
        best = self.search("fixed", limit_bytes, 4 * STEP_CELLS)
        self.search("psi", limit_bytes, max(STEP_CELLS, best))


class _Probing:
    """One probe while it runs."""

    def __init__(
        self, model: Path, options: CapacityOptions, variant: Variant, limit_bytes: int, length: int
    ) -> None:
        self._model, self._options = model, options
        self._variant, self._limit_bytes, self._length = variant, limit_bytes, length
        self._tokens: list[messages.Token] = []
        self._returned: list[Trimmed | Released] = []
        self._last_turn = ""
        self._grown: messages.Grown | None = None

    def play(self, on_progress: Callable[[int], None]) -> Probe:
        """All of it. Raises BadInputError for a file that is no model."""
        ending: Ending = "survived"
        why = ""
        options = self._options
        argv = [sys.executable, "-m", grow.__name__, "--variant", self._variant, "--model", str(self._model)]
        argv += ["--length", str(self._length), "--tokens", str(options.tokens)]
        argv += ["--chunk", str(options.chunk), "--threads", str(options.threads)]
        with Host(argv, self._model, self._limit_bytes, options.swap, options.swap_bytes) as host:
            try:
                self._follow(host, on_progress)
            except ModelKilledError as error:
                ending, why = "killed", str(error)
            except _Slow as error:
                ending, why = "slow", str(error)
            except BadInputError:
                raise
            except PsiKvError as error:
                ending, why = "failed", str(error)
            peak_bytes = host.pen.group.peak_bytes() or 0
        return self._probe(ending, why, peak_bytes)

    def _follow(self, host: Host, on_progress: Callable[[int], None]) -> None:
        """Until it has grown. A chunk that does not come in its time is as slow as one that came late."""
        heard_s = time.monotonic()
        while self._grown is None:
            for message in host.hear(_HEAR_S):
                self._take_in(message, on_progress)
                if isinstance(message, (messages.Token, messages.Filling)):
                    heard_s = time.monotonic()
            host.check_alive()
            self._check_pace(time.monotonic() - heard_s)

    def _take_in(self, message: messages.Message, on_progress: Callable[[int], None]) -> None:
        if isinstance(message, messages.Filling):
            on_progress(message.done)
        elif isinstance(message, messages.Token):
            self._tokens.append(message)
        elif isinstance(message, messages.Turned):
            self._last_turn = message.reason
        elif isinstance(message, messages.Governed) and isinstance(message.event, (Trimmed, Released)):
            self._returned.append(message.event)
        elif isinstance(message, messages.Grown):
            self._grown = message

    def _check_pace(self, silent_s: float) -> None:
        """Raises _Slow."""
        least = self._options.least_tokens_per_s or _ANY_PACE
        if not self._tokens:
            if silent_s > _OPEN_S:
                raise _Slow(f"it did not open in {_OPEN_S:.0f} s")
            return
        if too_slow(self._tokens, silent_s, self._options, least):
            raise _Slow(f"less than {least:g} tokens per second")

    def _probe(self, ending: Ending, why: str, peak_bytes: int) -> Probe:
        chunks = [token for token in self._tokens if token.tokens > 1]
        seconds = sum(token.seconds for token in chunks)
        grown = self._grown
        return Probe(
            variant=self._variant,
            limit_bytes=self._limit_bytes,
            length=self._length,
            ending=ending,
            why=why,
            done_tokens=sum(token.tokens for token in self._tokens),
            prefill_tokens_per_s=sum(token.tokens for token in chunks) / seconds if chunks else None,
            token_s=[token.seconds for token in self._tokens if token.tokens == 1],
            peak_bytes=peak_bytes,
            live_cells=0 if grown is None else grown.live_cells,
            spilled_cells=0 if grown is None else grown.spilled_cells,
            lost_cells=0 if grown is None else grown.lost_cells,
            returned_bytes=sum(event.bytes_returned for event in self._returned),
            trims=sum(isinstance(event, Trimmed) for event in self._returned),
            last_turn="" if ending == "survived" else self._last_turn,
        )


def too_slow(
    decoded: Sequence[messages.Token], silent_s: float, options: CapacityOptions, least_per_s: float
) -> bool:
    """Whether the last chunk of the prompt, or all of the tokens that come one by one, take too long.

    `decoded` has at least one. What is waited for counts as well, by the `silent_s` that it has taken so
    far. Single tokens are judged by their sum: the first one after a prompt is slower than the others.
    """
    singles_s = [token.seconds for token in decoded if token.tokens == 1]
    if singles_s:
        return max(sum(singles_s), silent_s) > options.tokens / least_per_s
    last = decoded[-1]
    return last.seconds > last.tokens / least_per_s or silent_s > options.chunk / least_per_s


def in_peace(model: Path, options: CapacityOptions, journal: Journal[Probe], say: Say) -> Probe:
    """The shortest context with memory to spare: what the model takes, and what it does.

    From the journal where it is there. Raises PsiKvError where the model can't be run.
    """
    for done in journal.parts:
        if done.limit_bytes == NO_LIMIT:
            return done
    say("measuring what the model takes")
    lenient = msgspec.structs.replace(options, least_tokens_per_s=_ANY_PACE)
    probing = _Probing(model, lenient, "fixed", roomy_bytes(), STEP_CELLS)
    found = msgspec.structs.replace(probing.play(lambda done: None), limit_bytes=NO_LIMIT)
    if found.ending != "survived":
        raise PsiKvError(f"the model cannot be run here: {found.why}")
    journal.add(found)
    return found


def auto_limits(need_bytes: int) -> tuple[int, ...]:
    """Limits above what the model takes, in whole steps of 8 MiB."""
    step = 8 * MIB
    return tuple(-(-(need_bytes + extra) // step) * step for extra in EXTRA_BYTES)
