"""The law beside a neighbour that takes, and beside other governors."""

from __future__ import annotations

import pytest
from paper import GB, GIB, MIB, Governed, Paper

from psi_kv_governor.control import Action


@pytest.mark.parametrize("bytes_per_s", [100e6, 150e6, 200e6])
def test_futility_does_not_hold_back_what_would_save_it(bytes_per_s):
    """8 GB without swap, a cache of 180 MiB; a neighbour wants the free GiB and 80 MiB more."""
    one = Governed("a", 180 * MIB)
    free = GIB
    base = 8 * GB - free - 180 * MIB
    wants = free + 80 * MIB
    paper = Paper(8 * GB, lambda t: base + min(wants, int(bytes_per_s * max(0.0, t - 5))), [one])
    paper.run(60.0)
    assert paper.killed_s is None


# -- several governors -------------------------------------------------------------------------------------


def herd(n: int, *, known: bool, jitters: bool) -> Paper:
    """`n` processes that wait for half of their context, and room for a third of that."""
    caches = [Governed(f"p{i}", 512 * MIB, jitter=i / n if jitters else 0.0) for i in range(n)]
    for i, one in enumerate(caches):
        one.live_bytes, one.masked_bytes, one.last_used_s = 256 * MIB, 256 * MIB, float(i)
    room = 320 * MIB + n * 256 * MIB // 3
    return Paper(8 * GB, lambda _: 8 * GB - room - n * 256 * MIB, caches, known=known)


SETTLED_S = 30.0
"""Six quiet times: what there is room for is back by then."""


def settled(paper: Paper) -> bool:
    """Whether nobody does anything any more: the machine stays as it is, and so do its readings."""
    return all(one.acts[-1][0] < SETTLED_S for one in paper.caches if one.acts)


@pytest.mark.parametrize("n", [2, 3, 4, 8])
def test_governors_that_know_each_other_share_the_room(n):
    paper = herd(n, known=True, jitters=True)
    paper.run(2 * SETTLED_S)
    assert settled(paper)
    assert paper.least_bytes >= 0.04 * 8 * GB  # never under the line
    assert sum(one.count(Action.TRIM) for one in paper.caches) == 0
    assert sum(one.count(Action.RESTORE) for one in paper.caches) <= 10 * n
    first = next(one for one in reversed(paper.caches) if one.acts)
    assert first is paper.caches[-1]  # the one used last
    assert all(first.acts[0][0] <= one.acts[0][0] for one in paper.caches if one.acts)


@pytest.mark.parametrize("n", [2, 3, 4, 8])
def test_strangers_do_not_fill_the_same_room_at_once(n):
    paper = herd(n, known=False, jitters=True)
    paper.run(2 * SETTLED_S)
    assert settled(paper)
    assert paper.least_bytes >= 0.02 * 8 * GB  # half of the line, where it becomes acute
    assert sum(one.count(Action.TRIM) for one in paper.caches) <= 2 * n


def test_the_least_recently_used_gives_first():
    caches = [Governed(f"p{i}", 512 * MIB) for i in range(3)]
    for i, one in enumerate(caches):
        one.last_used_s = float(i)
    base = 8 * GB - 3 * 512 * MIB - 310 * MIB
    paper = Paper(8 * GB, lambda t: base + int(4 * MIB * t), caches)  # slowly through the line
    paper.run(20.0)
    assert paper.killed_s is None
    assert caches[0].acts
    assert not caches[1].acts
    assert not caches[2].acts


def test_together_they_give_what_a_fast_neighbour_takes():
    caches = [Governed(f"p{i}", 256 * MIB) for i in range(4)]
    base = 8 * GB - 4 * 256 * MIB - GIB
    wants = GIB + 400 * MIB
    paper = Paper(8 * GB, lambda t: base + min(wants, int(800e6 * max(0.0, t - 1))), caches)
    paper.run(20.0)
    assert paper.killed_s is None
    assert (
        min(one.live_bytes for one in caches) > 51 * MIB
    )  # nobody is at the floor while others give nothing
