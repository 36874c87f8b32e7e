"""The command lines of a scene's processes."""

from __future__ import annotations

import sys
from pathlib import Path

from psi_kv_governor.bench import load, worker
from psi_kv_governor.bench.messages import Variant
from psi_kv_governor.bench.script import MIB, SceneOptions


def worker_argv(variant: Variant, options: SceneOptions, pressure_file: Path | None) -> list[str]:
    """The model. `pressure_file` is what the reference polls."""
    argv = [sys.executable, "-m", worker.__name__, "--variant", variant, "--model", options.model]
    for name, value in (
        ("--context", options.context_tokens),
        ("--tokens", options.tokens),
        ("--ctx-size", options.context_cells),
        ("--keep", options.keep),
        ("--tail", options.tail),
        ("--min-prune", options.min_prune),
        ("--pressure-file", pressure_file),
        ("--threads", options.threads),
        ("--max-s", options.decode_max_s),
        ("--restore-s", options.restore_max_s),
    ):
        if value is not None:
            argv += [name, str(value)]
    return [*argv, "--by-hand"] if options.gentle else argv


def neighbour_argv(options: SceneOptions) -> list[str]:
    """The process that takes memory."""
    mib = max(1, options.pressure_bytes // MIB)
    argv = [sys.executable, "-m", load.__name__, "--kind", options.load, "--mib", str(mib)]
    argv += ["--step-mib", str(max(1, options.step_bytes // MIB)), "--pause-s", str(options.pause_s)]
    argv += ["--rate-mib-s", str(options.rate_bytes_per_s / MIB), "--seed", str(options.seed)]
    return [*argv, "--folder", options.folder] if options.folder else argv
