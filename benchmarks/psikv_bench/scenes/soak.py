"""What the governor itself costs: processor time while the machine is calm, memory, and growth over time.

Measured in processes of their own: the memory without a model, where nothing else grows; the rest with the
model open, in cycles of calm that each end with a trim and a restore.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Annotated

import msgspec
from msgspec import Meta

from psi_kv_governor.errors import PsiKvError
from psi_kv_governor.sandbox import messages
from psi_kv_governor.sandbox.guardian import package_path
from psi_kv_governor.sandbox.host import Host
from psi_kv_governor.sandbox.messages import Looked, Setup
from psikv_bench.figures import Asked, Figure, figure
from psikv_bench.options import Options
from psikv_bench.record import Recorder, Report
from psikv_bench.scene import Scene
from psikv_bench.trials.sizing import until_opened

MB = 1_000_000
PROCESSOR = Asked("<", 0.002, "median")
MEMORY = Asked("<", 16, "max")
GROWTH = Asked("<", 1, "max")
NO_MORE = Asked("<=", 0, "max")

_CTX = 2048
_TOKENS = 1024
_SETTLE_CYCLES = 2
"""Before growth is counted: lazy imports, buffers that are made once, the allocator's arenas."""
_TIMEOUT_S = 300.0
# Anonymous memory that a running governor adds to a Python with numpy, which llama_cpp needs itself.
_ALONE = """
import time
import numpy as np
from psi_kv_governor.sandbox.process_memory import own_memory
np.zeros(1)
before = own_memory()
from psi_kv_governor.engines.simulated import SimulatedEngine
from psi_kv_governor.governor import Governor
engine = SimulatedEngine()
engine.add_cache(8192)
engine.decode(8000)
engine.caches[1].sequence(0).running = True
with Governor(engine) as governor:
    governor.trim(0.5)
    governor.restore()
    time.sleep(2.0)
    print(own_memory().anonymous_bytes - before.anonymous_bytes)
"""


class SoakOptions(Options, frozen=True, kw_only=True):
    """How long it is watched."""

    repeats: Annotated[int, Meta(ge=1, description="Cycles of calm, a trim and a restore.")] = 60
    cycle_s: Annotated[float, Meta(gt=0, description="Seconds of calm in a cycle.")] = 30.0


class Cycle(msgspec.Struct, frozen=True, kw_only=True):
    """One stretch of calm, then a trim and a restore."""

    processor: float
    """Share of one core that the governor's thread took during the calm."""
    turns: int
    """Of its loop."""
    after: Looked
    """After everything was restored."""


def run(recorder: Recorder[SoakOptions]) -> Report:
    """Raises PsiKvError where the model can't be run."""
    options = recorder.options
    recorder.say("memory without a model")
    added_bytes = _alone()
    setup = Setup(
        variant="psi", model=options.model, context_tokens=_TOKENS, context_cells=_CTX, prefill_threads=1
    )
    with Host(setup) as host:
        until_opened(host, recorder.say)
        cycles = []
        for number in range(options.repeats):
            recorder.say(f"cycle {number + 1} of {options.repeats}")
            cycles.append(_cycle(host, options.cycle_s))
    figures = list(_figures(added_bytes, cycles, options.cycle_s))
    return recorder.save(recorder.report(figures, [1]))


def _alone() -> int:
    environment = {**os.environ, "PYTHONPATH": package_path()}
    done = subprocess.run([sys.executable, "-c", _ALONE], capture_output=True, env=environment, check=False)
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip().splitlines()
        raise PsiKvError(said[-1] if said else f"the process ended with status {done.returncode}")
    return int(done.stdout)


def _look(host: Host) -> Looked:
    host.order(messages.Look())
    return host.until(Looked, _TIMEOUT_S)


def _cycle(host: Host, cycle_s: float) -> Cycle:
    before, began_s = _look(host), time.monotonic()
    time.sleep(cycle_s)
    after = _look(host)
    share = (after.governor_cpu_s - before.governor_cpu_s) / (time.monotonic() - began_s)
    host.done(messages.Trim(), _TIMEOUT_S)
    host.order(messages.Settle(max_s=0.0))
    host.until(messages.Settled, _TIMEOUT_S)
    return Cycle(processor=share, turns=after.turns - before.turns, after=_look(host))


def _figures(added_bytes: int, cycles: Sequence[Cycle], cycle_s: float) -> Iterator[Figure]:
    yield figure("memory of the governor", "MB", [added_bytes / MB], MEMORY)
    case = f"{len(cycles)} cycles of {cycle_s:g} s of calm, a trim and a restore"
    yield figure("share of one core", "share", [cycle.processor for cycle in cycles], PROCESSOR, case=case)
    yield figure("turns a second", "1/s", [cycle.turns / cycle_s for cycle in cycles], case=case)
    settled = [cycle.after for cycle in cycles[min(_SETTLE_CYCLES, len(cycles) - 1) :]]
    first = settled[0]
    growth = [(one.memory.anonymous_bytes - first.memory.anonymous_bytes) / MB for one in settled]
    # In the first half arenas and the edges of blocks find their places: 2 MB in 14 minutes, then nothing.
    later = [growth[-1] - growth[len(growth) // 2]]
    yield figure("growth of memory in the second half", "MB", later, GROWTH, case=case)
    yield figure("memory over the first settled cycle", "MB", growth, case=case)
    descriptors = [float(one.descriptors - first.descriptors) for one in settled]
    yield figure("more file descriptors", "", descriptors, NO_MORE, case=case)
    yield figure(
        "more threads", "", [float(one.threads - first.threads) for one in settled], NO_MORE, case=case
    )
    missing = [float(cycle.after.masked_cells + cycle.after.lost_cells) for cycle in cycles]
    yield figure("cells not restored", "cells", missing, NO_MORE, case=case)


SCENE = Scene(
    about="What the governor itself costs: processor time when calm, memory, and growth over half an hour.",
    options=SoakOptions(),
    quick=SoakOptions(repeats=6, cycle_s=5.0),
    run=run,
    examples=("psi-kv bench soak --quick",),
)
