"""What the governor itself costs: processor time while the machine is calm, memory, and growth over time.

Measured in processes of their own (`python -m psi_kv_governor.bench.soak`): the memory without a model, where
nothing else grows; the rest with the model open, in cycles of calm that each end with a trim and a restore.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec

from psi_kv_governor.bench import guardian
from psi_kv_governor.bench.record import Asked, Figure, Options, Recorder, Report, Say, figure
from psi_kv_governor.bench.sampling import sample
from psi_kv_governor.errors import BadInputError, PsiKvError

MB = 1_000_000
PROCESSOR = Asked("<", 0.002, "median")
MEMORY = Asked("<", 16, "max")
GROWTH = Asked("<", 1, "max")
NO_MORE = Asked("<=", 0, "max")

_CTX = 2048
_TOKENS = 1024
_SETTLE_CYCLES = 2
"""Before growth is counted: lazy imports, buffers that are made once, the allocator's arenas."""


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """How long it is watched."""

    cycles: int
    cycle_s: float


FULL = Plan(cycles=60, cycle_s=30.0)
QUICK = Plan(cycles=6, cycle_s=5.0)


class Cycle(msgspec.Struct, frozen=True, kw_only=True):
    """One stretch of calm, then a trim and a restore."""

    processor: float
    """Share of one core that the governor's thread took during the calm."""
    readings: int
    anonymous_bytes: int
    """After everything was restored."""
    descriptors: int
    threads: int
    missing: int


def run(options: Options, say: Say = lambda doing: None) -> Report:
    """`psi-kv bench soak`. Raises PsiKvError where the model can't be run."""
    plan = QUICK if options.quick else FULL
    if options.repeats is not None:
        plan = msgspec.structs.replace(plan, cycles=options.repeats)
    recorder = Recorder("soak", options, [1])
    say("memory without a model")
    added_bytes = json.loads(_child(["--alone"]))
    argv = ["--model", str(options.model), "--cycles", str(plan.cycles), "--cycle-s", str(plan.cycle_s)]
    say(f"{plan.cycles} cycles of {plan.cycle_s:g} s")
    cycles = msgspec.json.decode(_child(argv), type=list[Cycle])
    return recorder.report(list(_figures(added_bytes, cycles, plan)))


def _figures(added_bytes: int, cycles: list[Cycle], plan: Plan) -> Iterator[Figure]:
    yield figure("memory of the governor", "MB", [added_bytes / MB], MEMORY)
    case = f"{plan.cycles} cycles of {plan.cycle_s:g} s of calm, a trim and a restore"
    yield figure("share of one core", "share", [cycle.processor for cycle in cycles], PROCESSOR, case=case)
    yield figure("readings a second", "1/s", [c.readings / plan.cycle_s for c in cycles], case=case)
    settled = cycles[min(_SETTLE_CYCLES, len(cycles) - 1) :]
    first = settled[0]
    growth = [(cycle.anonymous_bytes - first.anonymous_bytes) / MB for cycle in settled]
    # In the first half arenas and the edges of blocks find their places: 2 MB in 14 minutes, then nothing.
    later = [growth[-1] - growth[len(growth) // 2]]
    yield figure("growth of memory in the second half", "MB", later, GROWTH, case=case)
    yield figure("memory over the first settled cycle", "MB", growth, case=case)
    descriptors = [float(cycle.descriptors - first.descriptors) for cycle in settled]
    yield figure("more file descriptors", "", descriptors, NO_MORE, case=case)
    yield figure("more threads", "", [float(c.threads - first.threads) for c in settled], NO_MORE, case=case)
    yield figure("cells not restored", "cells", [float(c.missing) for c in cycles], NO_MORE, case=case)


def _child(arguments: list[str]) -> bytes:
    argv = [sys.executable, "-m", __name__, *arguments]
    environment = {**os.environ, "PYTHONPATH": guardian.package_path()}
    child = subprocess.Popen(
        argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, env=environment
    )
    try:
        out, said = child.communicate()
    except BaseException:
        child.kill()
        child.wait()
        raise
    if child.returncode:
        lines = said.decode(errors="replace").strip().splitlines()
        failure = BadInputError if child.returncode == BadInputError.exit_status else PsiKvError
        raise failure(lines[-1] if lines else f"the process ended with status {child.returncode}")
    return out


# -- in the process of its own -----------------------------------------------------------------------------


def main() -> int:
    """Measure, and print it as JSON."""
    parser = argparse.ArgumentParser(prog="psi_kv_governor.bench.soak", description=main.__doc__)
    parser.add_argument("--alone", action="store_true", help="memory of a governor without a model")
    parser.add_argument("--model", type=Path, help="GGUF file")
    parser.add_argument("--cycles", type=int, default=1)
    parser.add_argument("--cycle-s", type=float, default=1.0)
    options = parser.parse_args()
    try:
        found = _alone() if options.alone else _cycles(options.model, options.cycles, options.cycle_s)
    except PsiKvError as error:
        print(error, file=sys.stderr)
        return error.exit_status
    sys.stdout.buffer.write(msgspec.json.encode(found))
    return 0


def _anonymous_bytes() -> int:
    look = sample(os.getpid())
    if look is None:
        raise PsiKvError("this kernel does not tell: /proc/self/smaps_rollup is needed (Linux 4.14)")
    return look.anonymous_bytes


def _alone() -> int:
    """Anonymous memory that a running governor adds to a Python with numpy, which llama_cpp needs itself."""
    import numpy as np

    np.zeros(1)
    before_bytes = _anonymous_bytes()
    from psi_kv_governor.engine.simulated import SimulatedEngine
    from psi_kv_governor.governor import Governor

    engine = SimulatedEngine(8192)
    engine.grow(8000)
    with Governor(engine) as governor:
        governor.trim(0.5)
        governor.restore()
        time.sleep(2.0)
        return _anonymous_bytes() - before_bytes


def _cycles(model: Path, cycles: int, cycle_s: float) -> list[Cycle]:
    from psi_kv_governor import GovernedLlama
    from psi_kv_governor.bench.twins import prefill, prompt_tokens

    llm = GovernedLlama(str(model), n_ctx=_CTX, n_threads=1, n_threads_batch=1, verbose=False)
    try:
        prefill(llm, prompt_tokens(llm, _TOKENS), lambda doing: None, "")
        return [_cycle(llm, cycle_s) for _ in range(cycles)]
    finally:
        llm.close()


def _cycle(llm: object, cycle_s: float) -> Cycle:
    governor = llm.governor  # type: ignore[attr-defined]
    turns: list[int] = [0]

    def count(turn: object) -> None:
        turns[0] += 1

    end = governor.observe(count)
    began_s, before_s = time.monotonic(), _thread_s()
    time.sleep(cycle_s)
    share = (_thread_s() - before_s) / (time.monotonic() - began_s)
    end()
    governor.trim(0.5)
    governor.restore()
    return Cycle(
        processor=share,
        readings=turns[0],
        anonymous_bytes=_anonymous_bytes(),
        descriptors=sum(1 for _ in Path("/proc/self/fd").iterdir()),
        threads=threading.active_count(),
        missing=governor.status().holes,
    )


def _thread_s() -> float:
    """Processor time of the governor's thread so far (user and system), by the kernel's own account.

    /proc/[pid]/task/[tid]/schedstat counts nanoseconds; `stat` counts ticks of 10 ms.
    """
    for thread in threading.enumerate():
        if thread.name == "psi-kv-governor":
            text = Path(f"/proc/self/task/{thread.native_id}/schedstat").read_text()
            return int(text.split()[0]) / 1e9
    raise PsiKvError("the governor's thread is gone")


if __name__ == "__main__":
    sys.exit(main())
