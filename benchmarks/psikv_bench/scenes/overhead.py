"""What the governor costs while the machine is calm: decode speed against plain `llama_cpp.Llama`.

Each is open in a process of its own, so that plain is plain, and they take turns of a few tokens in the order
plain, governed, governed, plain, ..., so that a drift of the machine falls on both; each pair of turns gives
one ratio. A turn is a whole request (`Llama.generate`, greedy, on a prompt that is in the cache), the way in
which users decode. Both are opened more than once, in changing order: where their buffers come to lie in
memory makes up to one percent between two contexts that are the same, and stays for as long as they are open.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from psi_kv_governor.control.decision import Mode
from psi_kv_governor.errors import PsiKvError
from psi_kv_governor.events import Event, ModeChanged, Trimmed
from psikv_bench import messages
from psikv_bench.figures import Asked, Figure, figure
from psikv_bench.host import Host
from psikv_bench.machine import cores
from psikv_bench.messages import Done, Setup, Variant
from psikv_bench.options import Options
from psikv_bench.record import Recorder, Report
from psikv_bench.scene import Scene
from psikv_bench.trials.sizing import until_opened
from psikv_bench.worker import Worker

SPEED = Asked(">=", 0.997)
MEMORY_MB = Asked("<", 8.0)
_PROMPT_TOKENS = 256
"""Short: the longer the context, the more a token costs, and the less of that is overhead."""
_SPIN_S = 0.1
"""libgomp's idle threads spin for about 8 ms; after this none does."""
_TURN_TIMEOUT_S = 600.0


class OverheadOptions(Options, frozen=True, kw_only=True):
    """How much is measured."""

    repeats: Annotated[int, Meta(ge=1, description="Pairs of turns in each opening and setting.")] = 20
    openings: Annotated[int, Meta(ge=1, description="How often both are opened.")] = 5
    tokens: Annotated[int, Meta(ge=1, description="Of one turn: 0.2 to 0.5 s with the demo model.")] = 32
    idle_s: Annotated[float, Meta(gt=0, description="How long the idle process is watched.")] = 5.0
    variant: Annotated[Variant, Meta(description="Which of the governed ones.")] = "psi"
    prefill: Annotated[
        int, Meta(ge=0, le=255, description="Of a prompt in each turn, instead of decoding.")
    ] = 0


Pair = tuple[Done, Done]
"""Plain, governed."""


def run(recorder: Recorder[OverheadOptions]) -> Report:
    """Measure each number of threads; what is asked holds for the first.

    One thread leaves the governor's own a core to run on. With a thread for every core, as the second
    setting has it, the governor's readings interrupt threads that wait for each other; for information.
    Raises PsiKvError where the machine is not calm, or the model can't be run.
    """
    options = recorder.options
    settings = [options.threads] if options.threads else list(dict.fromkeys((1, cores())))
    tokens = options.prefill or options.tokens
    pairs: dict[int, list[Pair]] = {threads: [] for threads in settings}
    idle: list[float] = []
    written_kb: list[float] = []
    own_mb: list[float] = []
    for opening in range(options.openings):
        for threads in settings:
            with _opened(recorder, threads, governed_first=opening % 2 == 1) as both:
                before = both.written_bytes()
                found = list(both.pairs())
                pairs[threads] += found
                written_kb.append((both.written_bytes() - before) / (tokens * (len(found) + 1)) / 1e3)
                own_mb.append(both.own_bytes() / 1e6)
                recorder.say("looking at the idle process")
                idle.append(both.idle_share())
    figures: list[Figure] = []
    for threads, mine in pairs.items():
        figures += _figures(mine, tokens, threads, SPEED if threads == settings[0] else None)
    figures.append(figure("processor time while idle and calm", "share", idle))
    figures.append(figure("dirtied on a disk a token", "kB", written_kb))
    figures.append(figure("memory beside the engine", "MB", own_mb, MEMORY_MB))
    return recorder.save(recorder.report(figures, settings))


@contextmanager
def _opened(recorder: Recorder[OverheadOptions], threads: int, *, governed_first: bool) -> Iterator[_Both]:
    options = recorder.options
    setup = Setup(
        variant="fixed", model=options.model, context_tokens=_PROMPT_TOKENS, decoded_tokens=options.tokens,
        threads=threads, prefill_threads=1,
    )  # fmt: skip
    order: list[Variant] = ["fixed", options.variant]
    with ExitStack() as stack:
        hosts, cell_bytes = {}, 0
        for variant in order[::-1] if governed_first else order:
            host = stack.enter_context(Host(msgspec.structs.replace(setup, variant=variant)))
            hosts[variant], cell_bytes = host, until_opened(host, recorder.say).cell_bytes
        yield _Both(
            recorder,
            threads,
            hosts["fixed"],
            hosts[options.variant],
            cells=setup.cells,
            cell_bytes=cell_bytes,
        )


class CalmWatch:
    """Notes what the governor does: a machine under pressure is not what is measured here."""

    def __init__(self) -> None:
        self._seen = ""

    def __call__(self, message: messages.Message) -> None:
        if isinstance(message, messages.Governed):
            self.hear(message.event)

    def hear(self, event: Event) -> None:
        """Take in an event."""
        if isinstance(event, Trimmed) or (isinstance(event, ModeChanged) and event.new is Mode.TRIMMING):
            self._seen = event.reason

    def check(self) -> None:
        """Raises PsiKvError when the governor had to act."""
        if self._seen:
            raise PsiKvError(f"the machine is not calm ({self._seen}): measure again when it is")


@dataclass
class _Both:
    """The model twice with the same prompt in it."""

    recorder: Recorder[OverheadOptions]
    threads: int
    plain: Host
    governed: Host
    cells: int
    cell_bytes: int
    watch: CalmWatch = field(default_factory=CalmWatch)

    def pairs(self) -> Iterator[Pair]:
        """Pairs of turns; at least one, after one turn each that does not count."""
        options, watch = self.recorder.options, self.watch

        def turn(host: Host) -> Done:
            again = options.prefill
            time.sleep(_SPIN_S)
            host.order(Worker.generate, tokens=1 if again else options.tokens, again=again)
            return host.until(Done, _TURN_TIMEOUT_S, watch)

        for host in (self.plain, self.governed):
            turn(host)
        found = in_turns(lambda: turn(self.plain), lambda: turn(self.governed), options.repeats)
        for number, pair in enumerate(found, start=1):
            watch.check()
            self.recorder.say(f"{_threads_words(self.threads)}: pair {number} of {options.repeats}")
            yield pair

    def idle_share(self) -> float:
        """Processor time of the governor's thread while nobody decodes."""
        before, began_s = self._look(self.governed), time.monotonic()
        time.sleep(self.recorder.options.idle_s)
        worked_s = self._look(self.governed).governor_cpu_s - before.governor_cpu_s
        return worked_s / (time.monotonic() - began_s)

    def written_bytes(self) -> int:
        """Pages that the governed process made dirty on a disk so far, as the kernel counts them."""
        counts = Path(f"/proc/{self.governed.pid}/io").read_text().splitlines()
        return next(int(line.split(":")[1]) for line in counts if line.startswith("write_bytes"))

    def own_bytes(self) -> int:
        """What is resident of the governed process beyond the plain one, but for cells: of those the plain
        one has all, and the governed one as many as there are tokens."""
        ours, theirs = self._look(self.governed), self._look(self.plain)
        lacking_bytes = (self.cells - ours.live_cells) * self.cell_bytes
        return ours.memory.resident_bytes - theirs.memory.resident_bytes + lacking_bytes

    def _look(self, host: Host) -> messages.Looked:
        host.order(Worker.look)
        return host.until(messages.Looked, _TURN_TIMEOUT_S, self.watch)


def in_turns(plain: Callable[[], Done], governed: Callable[[], Done], pairs: int) -> Iterator[Pair]:
    """`pairs` pairs of turns, every second one the other way round."""
    for number in range(pairs):
        if number % 2:
            second = governed()
            yield plain(), second
        else:
            yield plain(), governed()


def _threads_words(threads: int) -> str:
    return f"{threads} thread{'s' if threads > 1 else ''}"


def _figures(pairs: Sequence[Pair], tokens: int, threads: int, asked: Asked | None) -> Iterator[Figure]:
    case = _threads_words(threads)
    ratios = [plain.seconds / governed.seconds for plain, governed in pairs]
    cpu_ratios = [plain.cpu_s / governed.cpu_s for plain, governed in pairs]
    yield figure("governed over plain speed", "x", ratios, asked, case=case)
    yield figure("the same by processor time", "x", cpu_ratios, case=case)
    yield figure("plain", "tokens/s", [tokens / plain.seconds for plain, _ in pairs], case=case)
    yield figure("governed", "tokens/s", [tokens / turn.seconds for _, turn in pairs], case=case)


SCENE = Scene(
    about="""What the governor costs while the machine is calm, against plain llama_cpp.Llama by turns.

    With one thread, as is asked, and with a thread for every core, for information.
    """,
    options=OverheadOptions(),
    quick=OverheadOptions(openings=2, repeats=10, idle_s=1.0),
    run=run,
    examples=(
        "psi-kv bench overhead --quick",
        "psi-kv bench overhead --variant psi-file --prefill 128 --out-dir overhead-prefill",
    ),
)
