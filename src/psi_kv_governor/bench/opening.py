"""What a context costs before a token is in it: a cache that is demand-paged from its first moment.

Each context is opened in a process of its own, which measures itself (`python -m
psi_kv_governor.bench.opening`): a peak (VmHWM) can't be taken back, and what is imported first matters.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args

import msgspec

from psi_kv_governor.bench import guardian
from psi_kv_governor.bench.record import Asked, Figure, Options, Recorder, Report, Say, cores, figure
from psi_kv_governor.bench.sampling import Sample, sample
from psi_kv_governor.bench.twins import prefill, prompt_tokens
from psi_kv_governor.errors import BadInputError, PsiKvError

MB = 1_000_000
ADDED = Asked("<", 64, "max")
PEAK_ABOVE_SMALL = Asked("<", 96, "max")
LEAST_GROWTH = Asked(">=", 0.95, "min")
MOST_GROWTH = Asked("<", 1.5, "max")
"""Of the bytes of the rows written: what grows beside them are llama.cpp's compute buffers."""

SMALL_CTX = 512
LARGE_CTX = 32_768

Variant = Literal["governed", "late", "plain"]
"""`late`: llama_cpp was imported before this package. `plain`: llama_cpp.Llama alone."""

_WORDS: dict[Variant, str] = {
    "governed": "governed",
    "late": "governed, llama_cpp imported first",
    "plain": "plain llama_cpp.Llama",
}
_TIMEOUT_S = 300.0


class Opened(msgspec.Struct, frozen=True, kw_only=True):
    """What one process saw."""

    before: Sample
    """With everything imported and no model."""
    after: Sample
    """With the model and its context open."""
    grown: list[Sample]
    """After each of two parts of the prompt."""
    cell_bytes: int
    """0 where nobody knows (`plain`)."""


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """How much is measured."""

    repeats: int
    part_tokens: int
    """Of each of the two parts. The second part's growth counts: with the first, other buffers fill too."""
    small_ctx: int = SMALL_CTX
    large_ctx: int = LARGE_CTX


FULL = Plan(repeats=5, part_tokens=1024)
QUICK = Plan(repeats=2, part_tokens=512)


def run(options: Options, say: Say = lambda doing: None) -> Report:
    """`psi-kv bench opening`. Raises PsiKvError where a process can't open the model."""
    plan = QUICK if options.quick else FULL
    if options.repeats is not None:
        plan = msgspec.structs.replace(plan, repeats=options.repeats)
    threads = options.threads or cores()
    recorder = Recorder("opening", options, [threads])
    return recorder.report(list(measure(options.model, plan, threads, say)))


def measure(model: Path, plan: Plan, threads: int, say: Say) -> Iterator[Figure]:
    """The figures of `plan`. The large contexts alternate with small ones in time."""
    small: list[Opened] = []
    large: dict[Variant, list[Opened]] = {variant: [] for variant in get_args(Variant)}
    for number in range(plan.repeats):
        say(f"opening contexts, {number + 1} of {plan.repeats}")
        small.append(_open(model, "governed", plan.small_ctx, 0, threads))
        for variant, opened in large.items():
            # How it grows is the same each time: once is enough.
            part = plan.part_tokens if variant == "governed" and number == 0 else 0
            opened.append(_open(model, variant, plan.large_ctx, part, threads))
    yield from _figures(small, large, plan)


def _figures(small: list[Opened], large: dict[Variant, list[Opened]], plan: Plan) -> Iterator[Figure]:
    small_case = f"governed, {plan.small_ctx:,} cells"
    yield figure("anonymous memory added", "MB", _added(small), case=small_case)
    yield figure("peak (VmHWM)", "MB", [opened.after.peak_bytes / MB for opened in small], case=small_case)
    for variant, found in large.items():
        asked = variant == "governed"
        case = f"{_WORDS[variant]}, {plan.large_ctx:,} cells"
        above = [
            (one.after.peak_bytes - other.after.peak_bytes) / MB
            for one, other in zip(found, small, strict=True)
        ]
        yield figure("anonymous memory added", "MB", _added(found), ADDED if asked else None, case=case)
        yield figure("peak (VmHWM)", "MB", [opened.after.peak_bytes / MB for opened in found], case=case)
        what = f"peak above that of {plan.small_ctx:,} cells"
        yield figure(what, "MB", above, PEAK_ABOVE_SMALL if asked else None, case=case)
    yield from _growth(large["governed"], plan)


def _added(found: list[Opened]) -> list[float]:
    return [(opened.after.anonymous_bytes - opened.before.anonymous_bytes) / MB for opened in found]


def _growth(found: list[Opened], plan: Plan) -> Iterator[Figure]:
    """Anonymous memory of tokens over the bytes of their rows: 1 when the cache grows with them alone."""
    grown = [opened for opened in found if opened.grown]
    shares = [
        (opened.grown[1].anonymous_bytes - opened.grown[0].anonymous_bytes)
        / (plan.part_tokens * opened.cell_bytes)
        for opened in grown
    ]
    case = f"{plan.part_tokens:,} more tokens in {plan.large_ctx:,} cells"
    yield figure("growth over the bytes of their rows", "x", shares, LEAST_GROWTH, case=case)
    yield figure("the same, upper bound", "x", shares, MOST_GROWTH, case=case)


def _open(model: Path, variant: Variant, n_ctx: int, part_tokens: int, threads: int) -> Opened:
    argv = [sys.executable, "-m", __name__, "--variant", variant, "--model", str(model)]
    argv += ["--ctx", str(n_ctx), "--part-tokens", str(part_tokens), "--threads", str(threads)]
    environment = {**os.environ, "PYTHONPATH": guardian.package_path()}
    done = subprocess.run(
        argv, capture_output=True, env=environment, stdin=subprocess.DEVNULL, timeout=_TIMEOUT_S, check=False
    )
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip().splitlines()
        failure = BadInputError if done.returncode == BadInputError.exit_status else PsiKvError
        raise failure(said[-1] if said else f"opening the model ended with status {done.returncode}")
    return msgspec.json.decode(done.stdout, type=Opened)


# -- in the process of its own -----------------------------------------------------------------------------


def main() -> int:
    """Open a context, decode two parts of a prompt, and print an Opened as JSON."""
    parser = argparse.ArgumentParser(prog="psi_kv_governor.bench.opening", description=main.__doc__)
    parser.add_argument("--variant", choices=get_args(Variant), required=True)
    parser.add_argument("--model", required=True, help="GGUF file")
    parser.add_argument("--ctx", type=int, required=True, help="cells of the context")
    parser.add_argument("--part-tokens", type=int, default=0, help="tokens of each part; 0: none")
    parser.add_argument("--threads", type=int, default=1, help="threads that decode the prompt")
    try:
        print(msgspec.json.encode(_measure_here(parser.parse_args())).decode())
    except PsiKvError as error:
        print(error, file=sys.stderr)
        return error.exit_status
    return 0


def _measure_here(options: argparse.Namespace) -> Opened:
    open_context = _imported(options.variant)
    before = _look()
    context = open_context(
        options.model, n_ctx=options.ctx, n_threads_batch=options.threads, flash_attn=True, verbose=False
    )
    try:
        after = _look()
        cell_bytes = 0 if options.variant == "plain" else context.governor.status().cell_bytes
        grown = list(_fill(context, options.part_tokens)) if options.part_tokens else []
    finally:
        context.close()
    return Opened(before=before, after=after, grown=grown, cell_bytes=cell_bytes)


def _imported(variant: Variant) -> Any:
    """The class to open, with all of its modules loaded."""
    if variant != "governed":
        from llama_cpp import Llama

        if variant == "plain":
            return Llama
    from psi_kv_governor import GovernedLlama

    return GovernedLlama


def _fill(context: Any, part_tokens: int) -> Iterator[Sample]:
    tokens = prompt_tokens(context, 2 * part_tokens)
    for start in (0, part_tokens):
        prefill(context, tokens[start : start + part_tokens], lambda doing: None, "")
        yield _look()


def _look() -> Sample:
    look = sample(os.getpid())
    if look is None:
        raise PsiKvError("this kernel does not tell: /proc/self/smaps_rollup is needed (Linux 4.14)")
    return look


if __name__ == "__main__":
    sys.exit(main())
