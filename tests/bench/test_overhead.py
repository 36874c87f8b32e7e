"""Turns in changing order, and a small real run of the overhead benchmark."""

from __future__ import annotations

import pytest
from psi_kv_governor.bench import overhead
from psi_kv_governor.bench.overhead import CalmWatch, Turn, in_turns
from psi_kv_governor.bench.record import Options

from psi_kv_governor.control.decision import Mode
from psi_kv_governor.errors import PsiKvError
from psi_kv_governor.events import ModeChanged, Trimmed


def test_every_second_pair_is_the_other_way_round_and_each_result_in_its_place():
    order: list[str] = []

    def turn(name: str, seconds: float) -> Turn:
        order.append(name)
        return Turn(seconds=seconds, cpu_s=seconds)

    pairs = list(in_turns(lambda: turn("plain", 1.0), lambda: turn("governed", 2.0), 4))
    assert order == ["plain", "governed", "governed", "plain"] * 2
    assert [(plain.seconds, governed.seconds) for plain, governed in pairs] == [(1.0, 2.0)] * 4


def changed(old: Mode, new: Mode) -> ModeChanged:
    return ModeChanged(time_s=1.0, old=old, new=new, reason="stall 40 %")


TRIMMED = Trimmed(
    time_s=1.0, cells=64, spilled=64, bytes_returned=1, seconds=0.1, reason="headroom 2 % is low"
)


@pytest.mark.parametrize(
    ("event", "reason"), [(changed(Mode.CALM, Mode.TRIMMING), "stall 40 %"), (TRIMMED, "headroom 2 % is low")]
)
def test_a_machine_under_pressure_is_not_measured(event, reason):
    watch = CalmWatch()
    watch(event)
    with pytest.raises(PsiKvError, match=f"not calm .{reason}"):
        watch.check()


def test_a_machine_that_is_only_watched_is_calm_enough():
    watch = CalmWatch()
    watch(changed(Mode.CALM, Mode.WATCHING))
    watch.check()


@pytest.mark.llama
def test_a_small_run_compares_the_two(demo_model):
    plan = overhead.Plan(openings=2, pairs=2, tokens=4, max_s=20.0, idle_s=0.05, prompt_tokens=32)
    found = list(overhead.measure(Options(model=demo_model), plan, [1], lambda doing: None))
    of = {entry.name: entry for entry in found}
    ratio = of["governed over plain speed"]
    assert len(ratio.values) == plan.openings * plan.pairs
    assert ratio.asked == overhead.SPEED
    assert 0.05 < ratio.median < 20  # 4 tokens on a busy machine tell no more
    assert of["plain"].median > 0
    assert of["governed"].median > 0
    assert len(of["processor time while idle and calm"].values) == 2


@pytest.mark.llama
def test_no_pair_is_begun_when_the_time_is_over(demo_model):
    plan = overhead.Plan(openings=1, pairs=50, tokens=2, max_s=0.0, idle_s=0.01, prompt_tokens=8)
    found = next(overhead.measure(Options(model=demo_model), plan, [1], lambda doing: None))
    assert len(found.values) == 1
