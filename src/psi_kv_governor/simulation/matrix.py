"""Many kinds of machine, each once busy and once calm, each with and without the governor: one table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random
from typing import NamedTuple

import msgspec

from psi_kv_governor.config import GovernorConfig
from psi_kv_governor.pressure.reading import Neighbour as Said
from psi_kv_governor.simulation.machine import Guest, Limit, Machine
from psi_kv_governor.simulation.neighbourhood import Seat
from psi_kv_governor.simulation.process import Model, Program
from psi_kv_governor.simulation.run import check_seconds
from psi_kv_governor.simulation.scenario import Curve

STEP_S = 0.02
"""As `poll_busy_s`: the fastest neighbours here fill a low line in a tenth of a second."""

PERIOD_S = 100.0
"""A busy neighbour comes once in so long: slowly the first half of it, suddenly in the second."""

FASTEST_BYTES_PER_S = 2.5e9
"""What one process can take, as measured: the kernel clears each page first."""

ZRAM_STALL_SCALE = 0.4
"""Overcommitment at which 63 % of the time is lost where pages go to zram: it takes a third of what it keeps,
and reading back costs microseconds and no disk. A shape, not a measurement."""

_MIB, _GIB = 1 << 20, 1 << 30
_SMALL = Model(145 * _MIB, 4096, 23_040)  # SmolLM2-135M, 4k
_MIDDLE = Model(2 * _GIB, 8192, 128 << 10)  # an 8B model at 2 bits, or a 3B one at 4; 8k: 1 GiB
_LARGE = Model(5 * _GIB, 8192, 512 << 10)  # an 8B model at 4 bits, 32k in blocks of four tokens: 4 GiB
_HUGE = Model(40 * _GIB, 8192, 2560 << 10)  # a 70B model at 4 bits, 64k in blocks of eight: 20 GiB
_EACH = Model(400 * _MIB, 4096, 64 << 10)  # a 1B model, 4k in a wide format: 256 MiB


class Row(NamedTuple):
    """One kind of machine."""

    name: str
    about: str
    limits: tuple[Limit, ...]
    """From the nearest outwards."""
    models: tuple[Model, ...]
    calm_share: float
    """What the neighbour holds of the limit it is in while all is calm."""
    peak_share: float
    """... and what it comes to when it is busy."""
    within: int = 0
    """Index of the limit that the neighbour is in."""
    strangers: bool = False
    """The governors do not hear of each other (other users)."""


def _machine(gib: float, *, swap_gib: float = 0.0, psi: bool = True) -> Limit:
    scale = ZRAM_STALL_SCALE if swap_gib else 0.06
    return Limit(int(gib * _GIB), swap_bytes=swap_gib * _GIB, psi=psi, stall_scale=scale)


def _group(gib: float, name: str, kind: str = "memory.max") -> Limit:
    return Limit(int(gib * _GIB), name=name, kind=kind, swap_bytes=0.0)


_ALL = (
    Row("board 512 MB", "no swap", (_machine(0.47),), (_SMALL,), 0.30, 0.56),
    Row("board 8 GB", "no swap", (_machine(7.6),), (_MIDDLE,), 0.40, 0.66),
    Row("board 8 GB, tight", "0.65 GB free when calm", (_machine(7.6),), (_MIDDLE,), 0.52, 0.66),
    Row("board 8 GB, no PSI", "headroom alone", (_machine(7.6, psi=False),), (_MIDDLE,), 0.40, 0.66),
    Row("laptop 16 GB, zram", "8 GB of zram", (_machine(15.4, swap_gib=8),), (_LARGE,), 0.20, 0.55),
    Row("laptop 16 GB, no swap", "", (_machine(15.4),), (_LARGE,), 0.20, 0.52),
    Row("server 128 GB", "no swap", (_machine(125.0),), (_HUGE,), 0.20, 0.55),
    Row(
        "container 512 MB", "on a host of 128 GB; the neighbour is in it",
        (_group(0.5, "/docker/model"), _machine(125.0)), (_SMALL,), 0.30, 0.58,
    ),
    Row(
        "memory.high 8 GB", "on a host of 32 GB; the neighbour is in it",
        (_group(8.0, "/user/model", "memory.high"), _machine(31.0)), (_MIDDLE,), 0.40, 0.68,
    ),
    Row(
        "slice of 8 GB", "siblings in the slice, no limit of its own",
        (_group(8.0, "/slice"), _machine(31.0)), (_MIDDLE,), 0.40, 0.68,
    ),
    Row("2 processes", "16 GB, no swap", (_machine(15.4),), (_MIDDLE,) * 2, 0.30, 0.68),
    Row("4 processes", "16 GB, no swap", (_machine(15.4),), (_MIDDLE,) * 4, 0.05, 0.29),
    Row("8 processes", "8 GB, no swap", (_machine(7.6),), (_EACH,) * 8, 0.04, 0.36),
    Row("8 strangers", "of other users, unheard", (_machine(7.6),), (_EACH,) * 8, 0.04, 0.36, strangers=True),
)  # fmt: skip

MATRIX: Sequence[Row] = _ALL
"""Every kind of machine, small ones first."""


class Figures(msgspec.Struct, frozen=True, kw_only=True):
    """What a run comes to."""

    trims: int
    restores: int
    written_bytes_per_h: int
    lost_s: float
    """Time lost to stalls, at the level that is worst off."""
    kills: int
    """Processes that the kernel killed, the neighbour among them."""
    tokens: int


class Comparison(msgspec.Struct, frozen=True, kw_only=True):
    """One machine in one state, with and without the governor."""

    machine: str
    about: str
    state: str
    """`calm` or `busy`."""
    governed: Figures
    ungoverned: Figures


def run_matrix(
    config: GovernorConfig,
    *,
    seed: int,
    seconds: float,
    rows: Sequence[Row] = MATRIX,
    tell: Callable[[str], None] = lambda name: None,
) -> list[Comparison]:
    """Run every row calm and busy for so many simulated seconds. Raises BadInputError as `simulate` does.

    `tell` is called with the name of what runs now.
    """
    check_seconds(seconds)
    compared = []
    for row in rows:
        for state in ("calm", "busy"):
            tell(f"{row.name}, {state}")
            with_, without = (
                _run(row, given, busy=state == "busy", seed=seed, seconds=seconds) for given in (config, None)
            )
            compared.append(
                Comparison(machine=row.name, about=row.about, state=state, governed=with_, ungoverned=without)
            )
    return compared


def _run(row: Row, config: GovernorConfig | None, *, busy: bool, seed: int, seconds: float) -> Figures:
    random = Random(f"{seed} {row.name} {busy}")
    guest = Guest(_coming(row, random) if busy else Curve([(0.0, row.calm_share)]), row.within)
    machine = Machine(row.limits, [guest], random)
    table: dict[str, Said] = {}
    programs = [
        Program(
            machine,
            model,
            config,
            name=f"model {number}",
            jitter=random.random(),
            neighbours=None if row.strangers or len(row.models) == 1 else Seat(f"model {number}", table),
            # Of several, half decode at a time: the others wait for their users.
            busy=_turns(number, len(row.models)),
        )
        for number, model in enumerate(row.models)
    ]
    for _ in range(round(seconds / STEP_S)):
        machine.advance(STEP_S)
        for program in programs:
            program.advance(STEP_S)
    for program in programs:
        program.close()
    acts = [act for program in programs for act in program.acts.list]
    return Figures(
        trims=sum(act.action == "trim" for act in acts),
        restores=sum(act.action == "restore" for act in acts),
        written_bytes_per_h=round(sum(one.written_bytes for one in programs) * 3600 / seconds),
        lost_s=round(machine.stall_s, 2),
        kills=machine.kills,
        tokens=sum(program.tokens for program in programs),
    )


def _coming(row: Row, random: Random) -> Curve:
    """Grows for 20 s, stays 10 s and goes; later the same within a second or two."""
    low, high = row.calm_share, row.peak_share
    amount_bytes = (high - low) * row.limits[row.within].limit_bytes
    sudden_s = max(random.uniform(0.5, 2.0), amount_bytes / FASTEST_BYTES_PER_S)
    return Curve(
        [
            (10.0, low), (30.0, high), (40.0, high), (41.0, low),
            (60.0, low), (60.0 + sudden_s, high), (85.0, high), (86.0, low),
        ],
        period_s=PERIOD_S,
    )  # fmt: skip


def _turns(number: int, of: int) -> tuple[float, float]:
    """From and until when a process decodes: alone always, of several each second one from the first on and
    the others from the neighbour's going."""
    return (0.0, float("inf")) if of == 1 or number % 2 == 0 else (45.0, float("inf"))
