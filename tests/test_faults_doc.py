"""docs/faults.md names tests, and each of them is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FAULTS = (ROOT / "docs/faults.md").read_text()
NAMED = sorted(set(re.findall(r"`(tests/[^`]+)`", FAULTS)))


@pytest.mark.parametrize("named", NAMED)
def test_a_test_that_is_named_is_there(named):
    file, _, name = named.partition("::")
    assert (ROOT / file).exists(), named
    if name:
        assert re.search(rf"def {re.escape(name)}\(", (ROOT / file).read_text()), named


def test_every_surrounding_has_a_test_of_its_own():
    rows = [
        line.strip("| ").split(" | ")
        for line in FAULTS.partition("## Surroundings")[2].splitlines()
        if "|" in line
    ]
    assert len(rows) > 30
    for row in rows[2:]:
        assert "::test_" in row[2], row[0]
