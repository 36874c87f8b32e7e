"""The scene of who lives: what it calls worse, the page in the docs, and a small real run."""

from __future__ import annotations

import os

import msgspec
import pytest

from psi_kv_governor.errors import BadInputError
from psikv_bench.record import Recorder
from psikv_bench.scenes import survival
from psikv_bench.scenes.survival import Pair, SurvivalOptions
from psikv_bench.survival import page
from psikv_bench.survival.lives import Run
from psikv_bench.survival.surroundings import QUICK, SURROUNDINGS


def pair(plain: str, governed: str, tokens=((1, 2), (1, 2)), again=((1,), (1,)), masked: int = 0) -> Pair:
    runs = [
        Run(surrounding="any", variant=variant, outcome=outcome, tokens=list(said), again=list(once))
        for variant, outcome, said, once in zip(
            ("fixed", "psi"), (plain, governed), tokens, again, strict=True
        )
    ]
    runs[1] = Run(**{**{name: getattr(runs[1], name) for name in Run.__struct_fields__}, "masked": masked})
    return Pair(surrounding="any", about="", plain=runs[0], governed=runs[1])


def test_worse_is_where_plain_lives_and_governed_does_not():
    assert not pair("lives", "lives").worse
    assert not pair("killed", "killed").worse
    assert not pair("killed", "lives").worse
    assert all(pair("lives", how).worse for how in ("killed", "error", "stuck"))


def test_answers_differ_where_nothing_was_masked_or_the_context_is_not_whole_again():
    assert pair("lives", "lives").answers == "equal"
    assert pair("lives", "lives", tokens=((1, 2), (1, 3))).answers == "differ"
    assert pair("lives", "lives", tokens=((1, 2), (1, 3)), masked=7).answers == "told: 7 masked"
    assert pair("lives", "lives", again=((1,), (2,)), masked=7).answers == "differ"


def test_a_surrounding_that_was_played_more_often_has_one_row_whatever_came_between():
    other = msgspec.structs.replace(pair("killed", "killed"), surrounding="other")
    rows = survival.table([pair("lives", "lives"), other, pair("lives", "killed"), other]).rows
    shown = [(name, plain, governed) for name, _, plain, governed, *_ in rows]
    assert shown == [("any", "lives", "1 of 2 live"), ("other", "killed", "killed")]


def test_each_surrounding_says_what_it_is_and_only_known_ones_are_asked_for():
    assert all((made.__doc__ or "").strip() for made in SURROUNDINGS.values())
    assert set(QUICK) <= set(SURROUNDINGS)
    with pytest.raises(BadInputError, match="known are"):
        SurvivalOptions(only=("nowhere",)).check()


def test_the_page_in_the_docs_has_the_record_s_table_and_no_row_in_which_governed_is_worse():
    text = page.PAGE.read_text()
    rows = page.rows()
    assert page.filled(text, rows) == text
    assert {row.surrounding for row in rows} == set(SURROUNDINGS)
    assert not any(row.worse or row.answers == "differ" for row in rows)


@pytest.mark.llama
@pytest.mark.cgroup
@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(os.geteuid() != 0, reason="mounts and other users (root)")
def test_a_small_real_run_in_which_both_live(demo_model):
    options = SurvivalOptions(model=str(demo_model), only=("noexec", "mapped-files"), ctx=256, tokens=4)
    report = survival.SCENE.run(Recorder("survival", options))
    assert report.passed, report.to_json().decode()
    assert [row.governed.outcome for row in report.rows] == ["lives", "lives"]


def lived(demo_model, name: str) -> Pair:
    """Plain and governed in one surrounding, for real."""
    # Longer than the neighbour takes for all of its own, also where it is held up.
    options = SurvivalOptions(model=str(demo_model), only=(name,), tokens=96)
    report = survival.SCENE.run(Recorder("survival", options))
    assert report.passed, report.to_json().decode()
    (row,) = report.rows
    if row.plain.outcome == "not here":
        pytest.skip(row.plain.why)
    return row


@pytest.mark.llama
@pytest.mark.swap
@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(os.geteuid() != 0, reason="root, as for the other surroundings")
def test_where_malloc_asks_for_huge_pages_memory_is_returned_all_the_same(demo_model):
    row = lived(demo_model, "huge-pages")
    assert row.governed.outcome == "lives", row.governed.why
    assert row.governed.returned_bytes > 10 << 20
