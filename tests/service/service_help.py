"""A governor over an engine on paper, and a machine set by hand; and pieces of C."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from fakes import FakeSource
from psi_kv_governor.config import GovernorConfig
from psi_kv_governor.engines.simulated import SimulatedEngine
from psi_kv_governor.governor import Governor

MIB = 1 << 20


def compiled_in(folder: Path, name: str, source: str, *flags: str) -> Path:
    """A piece of C, compiled."""
    if shutil.which("cc") is None:
        pytest.skip("there is no C compiler")
    target = folder / name
    words = ("cc", "-x", "c", "-", "-x", "none", "-o")
    subprocess.run([*words, str(target), *flags], input=source, text=True, check=True)
    return target


def paper() -> tuple[Governor, SimulatedEngine, FakeSource]:
    """Two sequences, one of them running; nothing happens but by `step`."""
    engine = SimulatedEngine()
    cache = engine.add_cache(4096, name="tiny")
    engine.decode(1500, sequence=0)
    engine.decode(1000, sequence=1)
    cache.sequence(0).running, cache.sequence(1).running = True, False
    source = FakeSource(tick_s=0.5)
    source.headroom_bytes, source.limit_bytes = 6000 * MIB, 8000 * MIB
    config = GovernorConfig(cooldown_s=0.0, quiet_s=2.0, status_socket=False)
    return Governor(engine, source=source, config=config, name="llama-server"), engine, source
