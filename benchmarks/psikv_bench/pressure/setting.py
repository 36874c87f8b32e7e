"""From what was asked to what is played: the isolation, the limit, the scene."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import msgspec

from psi_kv_governor.config import load_config
from psi_kv_governor.errors import BadInputError, PsiKvError
from psi_kv_governor.sandbox.sandbox import Sandbox, Swap
from psikv_bench.host import MIB, Host, neighbour
from psikv_bench.messages import Setup
from psikv_bench.pressure.options import PressureOptions
from psikv_bench.pressure.scene import SceneOptions, outside_bytes
from psikv_bench.record import Say, say_nothing
from psikv_bench.reference import POLL_S, THRESHOLD
from psikv_bench.trials.sizing import SWAP_BYTES, until_opened

_SHORT_SHARE = 0.4
"""Of the cache, that does not fit beside the load and the weights. The governor may give up twice as much."""
_HOT_SHARE = 0.1
"""Of what a process takes beside weights and cache, that decoding uses: the rest (the interpreter, buffers
for a prompt's batches) goes to swap at once and for good. Measured: with all of it inside the limit, plain
llama.cpp swapped 64 MB out once, stalled for 4 % of the time, and was not pressed. Without swap it stays: a
limit that leaves it out holds not even the trimmed cache, and the weights were read anew for each token."""
_LEAST_TIMES = 1.15
"""Of what the model takes at first: it grows by a tenth while the prompt comes in."""
_CALM_TIMES = 2.0
"""Without a neighbour nothing is to be pressed: twice what the model takes leaves the governor calm."""
_DECODE_MAX_S = 60.0
"""A run that has come to a stand is cut off here, and counts with the tokens that it got done."""


class Size(msgspec.Struct, frozen=True, kw_only=True):
    """What plain llama.cpp takes. Its cache is resident from the start, whatever is in it."""

    resident_bytes: int
    """Of the whole process, weights and all, after the first batch of a prompt."""
    weights_bytes: int
    """The model's file, which is mapped."""
    cell_bytes: int


def size_of(model: Path, cells: int, threads: int, say: Say = say_nothing, *, mmap: bool = True) -> Size:
    """Measure it in a process of its own. Raises PsiKvError where the model can't be run."""
    setup = Setup(
        variant="fixed", model=str(model), context_cells=cells, context_tokens=min(512, cells - 2),
        threads=threads, mmap=mmap,
    )  # fmt: skip
    try:
        with Host(setup) as host:
            opened = until_opened(host, say)
    except PsiKvError as error:
        raise PsiKvError(f"the model can't be run with {cells} cells: {error}") from error
    return Size(
        resident_bytes=opened.memory.resident_bytes,
        weights_bytes=model.stat().st_size,
        cell_bytes=opened.cell_bytes,
    )


class Setting(msgspec.Struct, frozen=True, kw_only=True):
    """What all runs of a benchmark have in common."""

    isolate: Literal["cgroup", "host"]
    """Each run in a memory cgroup of its own; or none, and so no real pressure."""
    limit_bytes: int | None
    swap: Swap | None
    swap_bytes: int
    prompt_tokens: int
    pressure_bytes: int
    decode_max_s: float
    size: Size | None
    """What plain llama.cpp took, from which the limit was chosen; None where the limit was given."""
    reference: str
    """What the published method does."""
    governor: dict[str, Any]
    """Its settings."""


def why_not_isolated(options: PressureOptions) -> str | None:
    """Why the runs have no sandbox (empty: it was asked for); None where each has one."""
    if options.isolate == "host":
        return ""
    able, why = Sandbox.available()
    return None if able else why


def limit_for(size: Size, options: PressureOptions) -> int:
    """The limit under which the full cache and the load do not fit.

    Raises BadInputError where the model alone would not fit either: the load is too small to press it.
    """
    if not options.pressure_mib:
        return int(size.resident_bytes * _CALM_TIMES)
    cache_bytes = size.cell_bytes * options.ctx_size
    other_bytes = max(0, size.resident_bytes - size.weights_bytes - cache_bytes)
    hot_share = 1.0 if options.swap == "none" else _HOT_SHARE
    kept_bytes = size.weights_bytes + (1 - _SHORT_SHARE) * cache_bytes + hot_share * other_bytes
    limit_bytes = int(kept_bytes) + options.pressure_mib * MIB
    if limit_bytes < size.resident_bytes * _LEAST_TIMES:
        lacking = size.resident_bytes * _LEAST_TIMES - limit_bytes
        raise BadInputError(
            f"--pressure-mib {options.pressure_mib} is too little: beside it, the model alone would not fit; "
            f"give {options.pressure_mib + math.ceil(lacking / MIB)} or more, or --memory-limit-mib"
        )
    return limit_bytes


def choose_setting(options: PressureOptions, say: Say = say_nothing) -> Setting:
    """Decide all that was left open. Runs the model once where the limit is to be found."""
    isolated = why_not_isolated(options) is None
    size, limit_bytes = None, None
    if isolated and options.memory_limit_mib is not None:
        limit_bytes = options.memory_limit_mib * MIB
    elif isolated:
        say("measuring what the model takes", new=True)
        size = size_of(Path(options.model), options.ctx_size, options.threads or 1, say, mmap=options.mmap)
        limit_bytes = limit_for(size, options)
    pressure_bytes = options.pressure_mib * MIB
    where = "the cgroup's memory.pressure" if isolated else "/proc"
    return Setting(
        isolate="cgroup" if isolated else "host",
        limit_bytes=limit_bytes,
        swap=options.swap if isolated else None,
        swap_bytes=SWAP_BYTES[options.swap] if isolated else 0,
        prompt_tokens=options.prompt,
        pressure_bytes=pressure_bytes if isolated else min(pressure_bytes, outside_bytes()),
        decode_max_s=_DECODE_MAX_S,
        size=size,
        reference=(
            f"polls avg10 of `some` in {where} every {POLL_S:g} s; at {THRESHOLD:.0%} everything between "
            f"--keep and --tail goes, if at least {options.min_prune} tokens"
        ),
        governor=msgspec.to_builtins(load_config(sink_cells=options.keep, window_cells=options.tail)),
    )


def scene_of(options: PressureOptions, setting: Setting, folder: Path | None) -> SceneOptions:
    """The scene that every variant plays. A neighbour that reads files makes them in `folder`."""
    return SceneOptions(
        setup=Setup(
            variant="fixed",
            model=options.model,
            context_tokens=setting.prompt_tokens,
            context_cells=options.ctx_size,
            threads=options.threads or 1,
            mmap=options.mmap,
            keep=options.keep,
            tail=options.tail,
            min_prune=options.min_prune,
        ),
        tokens=options.n_predict,
        limit_bytes=setting.limit_bytes,
        swap_bytes=setting.swap_bytes,
        pressure_bytes=setting.pressure_bytes,
        neighbour=tuple(
            neighbour(
                options.load,
                setting.pressure_bytes,
                step_mib=options.pressure_step_mib,
                rate_mib_s=options.pressure_rate_mib_s,
                seed=options.seed,
                folder=str(folder or "/var/tmp") if options.load == "files" else "",
            )
        ),
        warmup_s=options.pressure_warmup_s,
        decode_max_s=setting.decode_max_s,
    )


def is_judged(options: PressureOptions, setting: Setting) -> bool:
    """Whether what is asked was asked of this: of memory taken beside the model in a cgroup with zram, and of
    a machine without a neighbour. All else is for information."""
    calm = not setting.pressure_bytes
    return setting.isolate == "cgroup" and (calm or (options.load == "memory" and setting.swap == "zram"))


def remarks(options: PressureOptions, setting: Setting) -> Iterator[str]:
    """What a reader has to know before he believes a figure."""
    if setting.isolate == "host":
        why = why_not_isolated(options)
        yield "NOT ISOLATED, so nothing was pressed and no verdict is given" + (f": {why}" if why else "")
        if setting.pressure_bytes < options.pressure_mib * MIB:
            yield (
                f"the neighbour took {setting.pressure_bytes // MIB} MiB of the {options.pressure_mib} MiB "
                "asked for: a quarter of what was available"
            )
    elif not is_judged(options, setting):
        yield "no verdict is given: what is asked is asked of --load memory with --swap zram"
    for pid, name in mapped_by_others(Path(options.model)):
        yield (
            f"process {pid} ({name}) had the model mapped: its weights were charged there and not to the "
            "cgroup, so every variant had more memory than the limit says"
        )


def mapped_by_others(model: Path, root: Path = Path("/")) -> Iterator[tuple[int, str]]:
    """Processes that have the model's file mapped: their pages stay, and are charged where they are."""
    wanted = str(model.resolve())
    for maps in sorted((root / "proc").glob("[0-9]*/maps")):
        try:
            with maps.open(errors="surrogateescape") as lines:
                found = any(line.rstrip("\n").endswith(wanted) for line in lines)
            if found:
                yield int(maps.parent.name), (maps.parent / "comm").read_text().strip()
        except OSError:  # gone meanwhile, or not ours to see
            continue
