"""Work of the neighbours: two governed processes do not take each other's parking for pressure."""

from __future__ import annotations

import math
import time

import pytest

from psi_kv_governor.own_work import OwnWork
from psi_kv_governor.pressure.neighbours import Neighbours
from psi_kv_governor.pressure.reading import MACHINE, Level, Neighbour, Reading

HERE = Level(name="/slice", headroom_bytes=1, limit_bytes=2)


def reading(*work: tuple[float, float], levels: tuple[str, ...] = ("/slice", MACHINE)) -> Reading:
    """Of the second before 100 s."""
    near = Neighbour(id="1-1.room", levels=levels, work=work)
    return Reading(time_s=100.0, interval_s=1.0, levels=(HERE,), neighbours=(near,))


@pytest.mark.parametrize(
    ("work", "share"),
    [
        ([], 0.0),
        ([(99.25, 99.5)], 0.25),
        ([(99.25, 99.5), (99.375, 99.75)], 0.5),  # two of them at once are not counted twice
        ([(90.0, 99.125), (99.5, math.inf)], 0.625),
        ([(10.0, 20.0)], 0.0),
    ],
)
def test_what_a_neighbour_does_in_the_interval_is_taken_off(work, share):
    assert OwnWork().taken_off(reading(*work)).own == pytest.approx(share)


def test_work_under_another_limit_does_not_stall_here():
    assert OwnWork().taken_off(reading((99.0, 100.0), levels=(MACHINE,))).own == 0.0


def test_own_and_others_work_are_not_counted_twice():
    now_s = iter([99.75, 100.0])
    work, end_s = OwnWork(clock=lambda: next(now_s)), 100.0
    with work:
        pass
    look = Reading(
        time_s=end_s,
        interval_s=1.0,
        levels=(HERE,),
        neighbours=(Neighbour(id="x", levels=("/slice",), work=((end_s - 0.5, end_s),)),),
    )
    assert work.taken_off(look).own == pytest.approx(0.5)


def test_each_tells_the_other_when_it_works(tmp_path):
    one, other = Neighbours(tmp_path), Neighbours(tmp_path)
    level = (Level(name=MACHINE, headroom_bytes=1, limit_bytes=2),)
    with OwnWork(one):
        (running,) = other.read(level)[0].work
        assert running[0] <= running[1] <= time.monotonic()
    (done,) = other.read(level)[0].work
    assert running[0] == done[0] <= done[1] <= time.monotonic()
    one.close()
    other.close()
