"""The matrix of machines: nothing happens in calm, and nothing gets worse with the governor."""

from __future__ import annotations

from pathlib import Path

import pytest
from machines import MACHINES, run, table

DOCS = Path(__file__).parents[2] / "docs" / "control.md"


@pytest.mark.parametrize("machine", MACHINES, ids=lambda one: one.name)
def test_a_calm_machine_is_left_alone(machine):
    calm = run(machine, pressed=False, governed=True)
    assert (calm.trims, calm.restores, calm.given_bytes, calm.killed) == (0, 0, 0, False)


@pytest.mark.parametrize("machine", MACHINES, ids=lambda one: one.name)
def test_a_neighbour_that_comes_and_goes_kills_nobody_and_all_comes_back(machine):
    plain, governed = (run(machine, pressed=True, governed=one) for one in (False, True))
    assert not governed.killed
    assert plain.killed or governed.lost_s < plain.lost_s
    assert governed.trims
    assert governed.away_bytes == 0
    assert governed.given_bytes <= 2 * machine.caches * machine.cache_bytes


@pytest.mark.slow
def test_the_table_of_the_docs_is_what_comes_out():
    lines: list[str] = []
    table(lines.append)
    assert "\n".join(lines) in DOCS.read_text(), "paste what `python tests/control/machines.py` prints"
