"""A small real run of the opening benchmark: contexts in processes of their own."""

from __future__ import annotations

import pytest
from psi_kv_governor.bench import opening

from psi_kv_governor.errors import BadInputError

PLAN = opening.Plan(repeats=1, part_tokens=128, small_ctx=512, large_ctx=8192)
ROWS_MB = 8192 * 23_040 / opening.MB


@pytest.mark.llama
def test_a_governed_context_is_demand_paged_and_a_plain_one_is_not(demo_model):
    found = list(opening.measure(demo_model, PLAN, 1, lambda doing: None))
    added = {entry.case: entry for entry in found if entry.name == "anonymous memory added"}
    governed, late, plain = (added[f"{opening._WORDS[name]}, 8,192 cells"] for name in opening._WORDS)
    assert governed.passed
    assert governed.median < ROWS_MB / 3
    assert late.median < ROWS_MB / 3
    assert plain.median > ROWS_MB
    peaks = {entry.case: entry for entry in found if entry.name.startswith("peak above")}
    assert peaks[governed.case].passed
    assert peaks[plain.case].median > 0.8 * ROWS_MB
    growth = next(entry for entry in found if entry.name.startswith("growth"))
    assert growth.median > 0.9


@pytest.mark.llama
def test_a_process_that_fails_is_one_line(tmp_path):
    with pytest.raises(BadInputError, match=r"nothing\.gguf"):
        opening._open(tmp_path / "nothing.gguf", "governed", 512, 0, 1)
