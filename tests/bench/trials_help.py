"""Fabricated outcomes of trials."""

from __future__ import annotations

from psi_kv_governor.sandbox.process_memory import Sample
from psikv_bench.capacity_report import Probe
from psikv_bench.oom_report import Trial
from psikv_bench.reaction_report import Reaction
from psikv_bench.trials.series import Near
from psikv_bench.trials.sizing import Sizes
from psikv_bench.watch import Look, Pressure

MIB = 1 << 20


def trial(variant="psi", rate=100.0, **changed) -> Trial:
    """A run that both survived."""
    fields = {
        "number": 1,
        "sizes": Sizes(limit_bytes=400 * MIB, load_bytes=150 * MIB),
        "model_killed": False,
        "neighbour_killed": False,
        "stuck": False,
        "seconds": 3.0,
        "token_s": [0.02, 0.03, 0.5],
        "peak_bytes": 300 * MIB,
        "held_bytes": 200 * MIB,
        "returned_bytes": 100 * MIB,
        "trims": 2,
        "first_returned_s": 0.2,
        "whole": True,
        "trail": [],
    }
    return Trial(variant=variant, rate=rate, **{**fields, **changed})


def probe(variant="psi", length=1024, ending="survived", **changed) -> Probe:
    """A probe in 200 MiB."""
    fields = {
        "limit_bytes": 200 * MIB,
        "why": "" if ending == "survived" else "the kernel killed it",
        "done_tokens": length,
        "prompt_tokens_per_s": 80.0,
        "tokens_per_s": 20.0 if ending == "survived" else None,
        "peak_bytes": 190 * MIB,
        "live_cells": length,
        "masked_cells": 0,
        "lost_cells": 0,
    }
    return Probe(variant=variant, length=length, ending=ending, **{**fields, **changed})


def onset(mode="decode", **changed) -> Reaction:
    """A governed onset: a sign after 0.3 s, bytes back 0.1 s later, and a poller that noticed nothing."""
    fields = {
        "number": 1,
        "variant": "psi",
        "killed": False,
        "signal": "headroom",
        "signal_s": 0.3,
        "returned_s": 0.4,
        "polled_s": None,
        "returned_bytes": 30 * MIB,
        "whole": True,
        "near": Near(calm=[0.02], trim=[0.1], restore=[0.08], pressed=[0.03]),
        "watch_share": 0.02,
    }
    return Reaction(mode=mode, **{**fields, **changed})


def look(time_s, some_us=0, avg10=0.0, headroom_bytes=100 * MIB, anonymous_bytes=100 * MIB) -> Look:
    """A look at a calm cgroup."""
    memory = Sample(resident_bytes=0, anonymous_bytes=anonymous_bytes, swap_bytes=0, peak_bytes=0)
    return Look(
        time_s=time_s,
        inside=Pressure(some_us, 0, avg10),
        outside=None,
        headroom_bytes=headroom_bytes,
        memory=memory,
    )
