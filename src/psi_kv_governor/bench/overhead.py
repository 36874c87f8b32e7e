"""What the governor costs while the machine is calm: decode speed against plain `llama_cpp.Llama`.

Both are open in one process and take turns of a few tokens, in the order plain, governed, governed,
plain, ..., so that a drift of the machine falls on both; each pair of turns gives one ratio. A turn is a
whole request (`Llama.generate`, greedy, on a prompt that is in the cache), the way in which users decode.
Both are opened more than once, in changing order: where their buffers come to lie in memory makes up to one
percent between two contexts that are the same, and stays for as long as they are open.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any

import msgspec

from psi_kv_governor.bench.record import Asked, Figure, Options, Recorder, Report, Say, cores, figure
from psi_kv_governor.bench.twins import prefill, prompt_tokens
from psi_kv_governor.config import GovernorConfig
from psi_kv_governor.control.decision import Mode
from psi_kv_governor.errors import PsiKvError
from psi_kv_governor.events import Event, ModeChanged, Trimmed

SPEED = Asked(">=", 0.99)

_PROMPT_TOKENS = 256
"""Short: the longer the context, the more a token costs, and the less of that is overhead."""
_SETTLE_S = 0.1
"""libgomp's idle threads spin for about 8 ms; after this none does."""


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """How much is measured."""

    openings: int
    pairs: int
    """Of each opening, in each setting."""
    tokens: int = 32
    """Of one turn: 0.2 to 0.5 s with the demo model, so that the governor takes a reading in most turns."""
    max_s: float
    """No further pair is begun after this: with as many threads as cores, a busy machine makes a turn last
    many times as long (ggml's threads spin for each other)."""
    idle_s: float
    prompt_tokens: int = _PROMPT_TOKENS


FULL = Plan(openings=5, pairs=20, max_s=120.0, idle_s=5.0)
QUICK = Plan(openings=2, pairs=10, max_s=20.0, idle_s=1.0)


class Turn(msgspec.Struct, frozen=True, kw_only=True):
    """What one context took for its tokens."""

    seconds: float
    cpu_s: float
    """Processor time of the whole process: the governor's thread is in it, and a neighbour's load is not."""


def run(options: Options, say: Say = lambda doing: None) -> Report:
    """`psi-kv bench overhead`. Raises PsiKvError where the machine is not calm, or the model can't be run.

    One thread leaves the governor's own a core to run on. With a thread for every core, as the second
    setting has it, the governor's readings interrupt threads that wait for each other; for information.
    """
    plan = QUICK if options.quick else FULL
    if options.repeats is not None:
        plan = msgspec.structs.replace(plan, pairs=options.repeats)
    settings = [options.threads] if options.threads else list(dict.fromkeys((1, cores())))
    recorder = Recorder("overhead", options, settings)
    return recorder.report(list(measure(options, plan, settings, say)))


def measure(options: Options, plan: Plan, settings: Sequence[int], say: Say) -> Iterator[Figure]:
    """The figures for each number of threads in `settings`; what is asked holds for the first."""
    pairs: dict[int, list[Pair]] = {threads: [] for threads in settings}
    idle_shares = []
    for opening in range(plan.openings):
        with _Contexts(options.model, plan, say, governed_first=opening % 2 == 1) as contexts:
            for threads in settings:
                pairs[threads] += contexts.pairs(threads)
            say("looking at the idle process")
            idle_shares.append(_idle_share(plan.idle_s))
    for threads in settings:
        yield from _figures(pairs[threads], plan, threads, SPEED if threads == settings[0] else None)
    yield figure("processor time while idle and calm", "share", idle_shares)


Pair = tuple[Turn, Turn]
"""Plain, governed."""


class _Contexts:
    """The model twice with the same prompt in it, plain and governed. A context manager."""

    def __init__(self, model: Path, plan: Plan, say: Say, *, governed_first: bool) -> None:
        self._plan, self._say = plan, say
        self._watch = CalmWatch()
        opened = [open_one() for open_one in self._openers(str(model), governed_first)]
        self._plain, self._governed = opened[::-1] if governed_first else opened
        self._governed.governor.subscribe(self._watch)
        self._prompt = prompt_tokens(self._plain, plan.prompt_tokens)
        for context in opened:
            prefill(context, self._prompt, say, type(context).__name__)

    def _openers(self, model: str, governed_first: bool) -> list[Callable[[], Any]]:
        from psi_kv_governor import GovernedLlama  # before llama_cpp: see native.load_before_llama_cpp

        # isort: split
        import llama_cpp

        arguments: dict[str, Any] = {
            "n_ctx": self._plan.prompt_tokens + self._plan.tokens + 1,
            "n_threads_batch": 1,  # the prompt is short and not measured
            "flash_attn": True,
            "verbose": False,
        }
        openers = [
            lambda: llama_cpp.Llama(model, **arguments),
            lambda: GovernedLlama(model, config=GovernorConfig(), **arguments),
        ]
        return openers[::-1] if governed_first else openers

    def pairs(self, threads: int) -> Iterator[Pair]:
        """Pairs of turns with `threads` threads; at least one, after one turn each that does not count."""
        for context in (self._plain, self._governed):
            context._ctx.set_n_threads(threads, 1)
            self._turn(context)
        end_s = time.monotonic() + self._plan.max_s
        pairs = in_turns(
            lambda: self._turn(self._plain), lambda: self._turn(self._governed), self._plan.pairs
        )
        for number, pair in enumerate(pairs, start=1):
            self._watch.check()
            self._say(f"{_threads_words(threads)}: pair {number} of {self._plan.pairs}")
            yield pair
            if time.monotonic() > end_s:
                return

    def _turn(self, context: Any) -> Turn:
        time.sleep(_SETTLE_S)
        began_s, cpu_began_s = time.perf_counter(), time.process_time()
        request = context.generate(self._prompt, temp=0.0)
        decoded = sum(1 for _ in islice(request, self._plan.tokens))
        turn = Turn(seconds=time.perf_counter() - began_s, cpu_s=time.process_time() - cpu_began_s)
        request.close()
        if decoded != self._plan.tokens:
            raise PsiKvError(f"the model stopped after {decoded} of {self._plan.tokens} tokens")
        return turn

    def __enter__(self) -> _Contexts:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._plain.close()
        self._governed.close()


def in_turns(plain: Callable[[], Turn], governed: Callable[[], Turn], pairs: int) -> Iterator[Pair]:
    """`pairs` pairs of turns, every second one the other way round."""
    for number in range(pairs):
        if number % 2:
            second = governed()
            yield plain(), second
        else:
            yield plain(), governed()


def _threads_words(threads: int) -> str:
    return f"{threads} thread{'s' if threads > 1 else ''}"


def _figures(pairs: Sequence[Pair], plan: Plan, threads: int, asked: Asked | None) -> Iterator[Figure]:
    case = _threads_words(threads)
    ratios = [plain.seconds / governed.seconds for plain, governed in pairs]
    cpu_ratios = [plain.cpu_s / governed.cpu_s for plain, governed in pairs]
    yield figure("governed over plain speed", "x", ratios, asked, case=case)
    yield figure("the same by processor time", "x", cpu_ratios, case=case)
    yield figure("plain", "tokens/s", [plan.tokens / plain.seconds for plain, _ in pairs], case=case)
    yield figure("governed", "tokens/s", [plan.tokens / turn.seconds for _, turn in pairs], case=case)


def _idle_share(seconds: float) -> float:
    """Processor time of the whole process, both models open, while nobody decodes."""
    time.sleep(_SETTLE_S)
    began_s, cpu_began_s = time.perf_counter(), time.process_time()
    time.sleep(seconds)
    return (time.process_time() - cpu_began_s) / (time.perf_counter() - began_s)


class CalmWatch:
    """Notes what the governor does: a machine under pressure is not what is measured here."""

    def __init__(self) -> None:
        self._seen = ""

    def __call__(self, event: Event) -> None:
        if isinstance(event, Trimmed) or (isinstance(event, ModeChanged) and event.new is Mode.TRIMMING):
            self._seen = event.reason

    def check(self) -> None:
        """Raises PsiKvError when the governor had to act."""
        if self._seen:
            raise PsiKvError(f"the machine is not calm ({self._seen}): measure again when it is")
