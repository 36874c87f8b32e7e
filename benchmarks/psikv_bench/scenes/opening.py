"""What a context costs before a token is in it: a cache that is demand-paged from its first moment.

Each context is opened in a process of its own, which looks at itself: a peak (VmHWM) can't be taken back, and
what is imported first matters.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated

import msgspec
from msgspec import Meta

from psi_kv_governor.sandbox import messages
from psi_kv_governor.sandbox.host import Host
from psi_kv_governor.sandbox.messages import Opened, Setup
from psi_kv_governor.sandbox.process_memory import Sample
from psikv_bench.figures import Asked, Figure, figure
from psikv_bench.machine import cores
from psikv_bench.options import Options
from psikv_bench.record import Recorder, Report
from psikv_bench.scene import Scene
from psikv_bench.trials.sizing import until_opened

MB = 1_000_000
ADDED = Asked("<", 64, "max")
PEAK_ABOVE_SMALL = Asked("<", 96, "max")
LEAST_GROWTH = Asked(">=", 0.95, "min")
MOST_GROWTH = Asked("<", 1.5, "max")
"""Of the bytes of the rows written: what grows beside them are llama.cpp's compute buffers."""

_SETUPS = {
    "governed": Setup(variant="psi", model="", auto=False),
    "plain llama_cpp.Llama": Setup(variant="fixed", model=""),
}
_GOVERNED = "governed"
_TIMEOUT_S = 300.0


class OpeningOptions(Options, frozen=True, kw_only=True):
    """How much is measured."""

    repeats: Annotated[int, Meta(ge=1, description="How often each is opened.")] = 5
    part_tokens: Annotated[
        int, Meta(ge=1, description="Of each of the two parts of a prompt by which it grows.")
    ] = 1024
    small_ctx: Annotated[int, Meta(ge=256, description="Cells of the small context.")] = 512
    large_ctx: Annotated[int, Meta(ge=256, description="Cells of the large one.")] = 32_768


class _Grown(msgspec.Struct, frozen=True, kw_only=True):
    """Memory after each of two parts of a prompt. The second one's growth counts: with the first, other
    buffers fill too."""

    first: Sample
    second: Sample
    cell_bytes: float


def run(recorder: Recorder[OpeningOptions]) -> Report:
    """The large contexts alternate with small ones in time."""
    options = recorder.options
    threads = options.threads or cores()
    small: list[Opened] = []
    large: dict[str, list[Opened]] = {name: [] for name in _SETUPS}
    grown: _Grown | None = None
    for number in range(options.repeats):
        recorder.say(f"opening contexts, {number + 1} of {options.repeats}")
        small.append(_open(recorder, _SETUPS[_GOVERNED], options.small_ctx, threads)[0])
        for name, setup in _SETUPS.items():
            # How it grows is the same each time: once is enough.
            part = options.part_tokens if name == _GOVERNED and number == 0 else 0
            opened, found = _open(recorder, setup, options.large_ctx, threads, part)
            large[name].append(opened)
            grown = grown or found
    figures = list(_figures(small, large, grown, options))
    return recorder.save(recorder.report(figures, [threads]))


def _open(
    recorder: Recorder[OpeningOptions], setup: Setup, n_ctx: int, threads: int, part: int = 0
) -> tuple[Opened, _Grown | None]:
    model = recorder.options.model
    with Host(
        msgspec.structs.replace(setup, model=model, context_cells=n_ctx, prefill_threads=threads)
    ) as host:
        opened = until_opened(host, recorder.say)
        if not part:
            return opened, None
        first, second = (_filled(host, part) for _ in range(2))
        # The state of a context has the positions of its cells too, which the cache has elsewhere.
        return opened, _Grown(first=first, second=second, cell_bytes=_cell_bytes(recorder, setup))


def _filled(host: Host, tokens: int) -> Sample:
    host.done(messages.Fill(tokens=tokens), _TIMEOUT_S)
    host.order(messages.Look())
    return host.until(messages.Looked, _TIMEOUT_S).memory


def _cell_bytes(recorder: Recorder[OpeningOptions], setup: Setup) -> int:
    with Host(msgspec.structs.replace(setup, model=recorder.options.model, context_tokens=64)) as host:
        return until_opened(host, recorder.say).cell_bytes


def _figures(
    small: Sequence[Opened], large: dict[str, list[Opened]], grown: _Grown | None, options: OpeningOptions
) -> Iterator[Figure]:
    case = f"governed, {options.small_ctx:,} cells"
    yield figure("anonymous memory added", "MB", _added(small), case=case)
    yield figure("peak (VmHWM)", "MB", [one.memory.peak_bytes / MB for one in small], case=case)
    for name, found in large.items():
        asked = name == _GOVERNED
        case = f"{name}, {options.large_ctx:,} cells"
        above = [
            (one.memory.peak_bytes - other.memory.peak_bytes) / MB
            for one, other in zip(found, small, strict=True)
        ]
        yield figure("anonymous memory added", "MB", _added(found), ADDED if asked else None, case=case)
        yield figure("peak (VmHWM)", "MB", [one.memory.peak_bytes / MB for one in found], case=case)
        what = f"peak above that of {options.small_ctx:,} cells"
        yield figure(what, "MB", above, PEAK_ABOVE_SMALL if asked else None, case=case)
    if grown is not None:
        more_bytes = grown.second.resident_bytes - grown.first.resident_bytes
        shares = [more_bytes / (options.part_tokens * grown.cell_bytes)]
        case = f"{options.part_tokens:,} more tokens in {options.large_ctx:,} cells"
        yield figure("growth over the bytes of their rows", "x", shares, LEAST_GROWTH, case=case)
        yield figure("the same, upper bound", "x", shares, MOST_GROWTH, case=case)


def _added(found: Sequence[Opened]) -> list[float]:
    return [(one.memory.anonymous_bytes - one.imported.anonymous_bytes) / MB for one in found]


SCENE = Scene(
    about="What a context costs before a token is in it: added memory and peak at 32,768 cells.",
    options=OpeningOptions(),
    quick=OpeningOptions(repeats=2, part_tokens=512),
    run=run,
    examples=("psi-kv bench opening --quick",),
)
