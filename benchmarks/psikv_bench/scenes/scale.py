"""Caches of the shape of an 8B model at 32k and 128k cells: what opening, trimming and restoring them cost.

Each size is measured in a process of its own. The cells are filled in sequences of a thousand tokens, each in
a stream of its own, so that attention costs little; a sequence is parked when it is full, and restored one
at a time, so that the whole needs no 17 GB of memory.
"""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from psi_kv_governor.children import python_command, reason
from psi_kv_governor.errors import PsiKvError
from psikv_bench import wide_run
from psikv_bench.figures import Asked, Figure, figure
from psikv_bench.options import Options
from psikv_bench.record import Recorder, Report
from psikv_bench.scene import Scene
from psikv_bench.wide_model import CELL_BYTES, write_wide_model
from psikv_bench.wide_run import Size

GB = 1e9
LINEAR = Asked("<", 1.5)
"""Cost of a cell in the largest cache over that in the smallest: 1 is linear, the rest is noise."""
CLEAN = Asked(">=", 5.0)
"""GB/s at which clean ranges return."""
_LIMIT_S = 3600.0


Cells = Annotated[int, Meta(ge=2048)]


class ScaleOptions(Options, frozen=True, kw_only=True):
    """What is measured."""

    sizes: Annotated[tuple[Cells, ...], Meta(description="Cells.")] = (32_768, 131_072)
    backings: Annotated[tuple[str, ...], Meta(description="file, memory.")] = ("file", "memory")


def run(recorder: Recorder[ScaleOptions]) -> Report:
    """Measure each size with each backing, in a process of its own."""
    options = recorder.options
    threads = options.threads or 1
    found: list[Size] = []
    with tempfile.TemporaryDirectory() as folder:
        model = write_wide_model(Path(folder) / "wide.gguf", max(options.sizes))
        for n_cells in options.sizes:
            for backing in options.backings:
                recorder.say(f"{n_cells:,} cells, backing {backing}", new=True)
                found.append(_measured(model, n_cells, backing, threads))
    figures = [*(one for size in found for one in _figures(size)), *_growth(found)]
    note = (
        f"{CELL_BYTES:,} bytes a cell, as an 8B Llama has (32 layers, 8 heads of 128, f16); the weights are "
        "random and small. The demo model named below was not used."
    )
    return recorder.save(recorder.report(figures, [threads], notes=[note], rows=found))


def _measured(model: Path, n_cells: int, backing: str, threads: int) -> Size:
    command = python_command(wide_run.__name__, str(model), str(n_cells), backing, str(threads))
    done = subprocess.run(command, capture_output=True, timeout=_LIMIT_S, check=False)
    if done.returncode != 0:
        why = reason(done.stderr)
        raise PsiKvError(f"{n_cells:,} cells with backing {backing} can't be measured: {why}")
    return msgspec.json.decode(done.stdout.splitlines()[-1], type=Size)


def _figures(size: Size) -> Iterator[Figure]:
    case = f"{size.n_cells:,} cells, {size.backing}"
    yield figure("open", "s", [size.open_s], case=case)
    yield figure("resident when opened", "MB", [size.opened_bytes / 1e6], case=case)
    yield figure("map time (asking llama.cpp anew)", "ms", [s * 1e3 for s in size.map_s], case=case)
    for name, work, asked in (
        ("trim", size.trim, None),
        ("trim of clean ranges", size.trim_clean, CLEAN),
        ("restore", size.restore, None),
        ("release", size.release, None),
    ):
        yield figure(f"{name}: bytes", "GB", [work.n_bytes / GB], case=case)
        yield figure(name, "GB/s", [work.n_bytes / GB / max(work.seconds, 1e-9)], asked, case=case)
    yield figure("mappings of the cache", "times", [size.mappings], case=case)


_COSTS: dict[str, Callable[[Size], float]] = {
    "map time": lambda size: min(size.map_s) / size.n_cells,
    "trim": lambda size: size.trim.cost,
    "restore": lambda size: size.restore.cost,
    "release": lambda size: size.release.cost,
}


def _growth(found: Sequence[Size]) -> Iterator[Figure]:
    """What a cell costs in the largest cache, over what it costs in the smallest."""
    for backing in dict.fromkeys(size.backing for size in found):
        sizes = sorted((size for size in found if size.backing == backing), key=lambda size: size.n_cells)
        small, large = sizes[0], sizes[-1]
        case = f"{large.n_cells:,} over {small.n_cells:,} cells, {backing}"
        for name, cost in _COSTS.items() if small is not large else ():
            ratio = cost(large) / max(cost(small), 1e-15)
            yield figure(f"{name}: cost of a cell", "x", [ratio], LINEAR, case=case)


SCENE = Scene(
    about="""Caches of an 8B model's shape at 32k and 128k cells: open, trim, restore, release.

    Needs 18 GB of free disk for the largest, and memory for one sequence of it.
    """,
    options=ScaleOptions(),
    quick=ScaleOptions(sizes=(2048, 4096)),
    run=run,
    examples=("psi-kv bench scale --quick", "psi-kv bench scale --sizes 32768"),
)
