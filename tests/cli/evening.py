"""A recorded evening under pressure, and the commands on it."""

from __future__ import annotations

import functools
import json

from click.testing import CliRunner, Result

from psi_kv_governor.cli import main
from psi_kv_governor.config import GovernorConfig
from psi_kv_governor.control import Turn
from psi_kv_governor.engines.simulated import SimulatedEngine
from psi_kv_governor.governor import Governor
from psi_kv_governor.pressure.reading import Reading, one_level
from psi_kv_governor.pressure.trace import TraceSource

CONFIG = GovernorConfig(quiet_s=2.0)
LIMIT_BYTES = 1 << 30


def invoke(*args: str) -> Result:
    return CliRunner().invoke(main, list(args))


def reading(i: int) -> Reading:
    pressed = 30 <= i < 70
    return one_level(
        time_s=100.0 + i / 10,
        interval_s=0.1,
        some=0.3 if pressed else 0.0,
        full=0.1 if pressed else 0.0,
        headroom_bytes=LIMIT_BYTES // 5,
        limit_bytes=LIMIT_BYTES,
    )


def evening() -> list[Turn]:
    """A neighbour comes after 3 s, stays for 4 s and goes; the context grows meanwhile. Only stall tells."""
    return list(_played())


@functools.cache
def _played() -> tuple[Turn, ...]:
    now_s = 100.0
    engine = SimulatedEngine(clock=lambda: now_s)
    engine.add_cache(4096).sequence(0).running = True
    turns: list[Turn] = []
    governor = Governor(
        engine,
        source=TraceSource([reading(i) for i in range(150)]),
        config=CONFIG,
        clock=lambda: now_s,
        jitter=0.25,
    )
    governor.observe(turns.append)
    engine.decode(2047)
    for i in range(150):
        now_s = reading(i).time_s
        engine.decode(1)
        governor.step()
    governor.close()
    return tuple(turns)


def as_json(*args: str, status: int = 0) -> dict:
    result = invoke("replay", "--json", *args)
    assert result.exit_code == status, result.output
    return json.loads(result.stdout)
