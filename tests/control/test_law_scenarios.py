"""The law on machines that the first edition got wrong, each as it was found."""

from __future__ import annotations

import itertools
import random
import time

import msgspec
import pytest
from paper import GB, GIB, MIB, Governed, Paper

from psi_kv_governor.config import GovernorConfig
from psi_kv_governor.control import Action, CacheSnapshot, LawState, Mode, decide, pause_s
from psi_kv_governor.pressure import discover
from psi_kv_governor.pressure.reading import MACHINE, Level, Reading, one_level

CONFIG = GovernorConfig()


def cache(live_mib: int = 1024, masked_mib: int = 0, trimmable_mib: int | None = None) -> CacheSnapshot:
    return CacheSnapshot(
        live_bytes=live_mib * MIB,
        masked_bytes=masked_mib * MIB,
        lost_bytes=0,
        trimmable_bytes=(live_mib - 200 if trimmable_mib is None else trimmable_mib) * MIB,
        lossless_bytes=0,
        step_bytes=MIB,
    )


def reading(time_s: float, *levels: Level, interval_s: float = 1.0) -> Reading:
    return Reading(time_s=time_s, interval_s=interval_s, levels=levels)


def machine(headroom_bytes: int, limit_bytes: int, **more) -> Level:
    return Level(
        name=MACHINE, headroom_bytes=headroom_bytes, limit_bytes=limit_bytes, limit="MemAvailable", **more
    )


def play(looks, given: CacheSnapshot, config: GovernorConfig = CONFIG):
    state, decisions = LawState(), []
    for look in looks:
        decision, state = decide(config, state, look, given)
        decisions.append(decision)
    return decisions


# -- which level, and whose stall --------------------------------------------------------------------------


def test_the_level_nearest_its_line_decides_and_not_the_one_with_the_fewest_bytes():
    own = Level(name="/own", headroom_bytes=450 * MIB, limit_bytes=8 * GIB, some=0.0, full=0.0)
    looks = [reading(t, own, machine(500 * MIB, 128 * GIB, some=0.0, full=0.0)) for t in range(10)]
    decisions = play(looks, cache(masked_mib=100))
    assert {d.action for d in decisions} == {Action.TRIM}
    assert decisions[0].reason.startswith("machine at MemAvailable: ")


@pytest.mark.parametrize("own_stall", [0.0, None])
def test_in_a_cgroup_without_a_limit_the_worse_of_own_and_machine_counts(own_stall):
    own = Level(name="/user.slice/terminal.scope", some=own_stall, full=own_stall)
    short = machine(GIB, 8 * GIB, some=0.6, full=0.3)
    assert play([reading(1.0, own, short)], cache())[0].action is Action.TRIM
    mine = msgspec.structs.replace(own, some=0.6, full=0.3)
    calm = msgspec.structs.replace(short, some=0.0, full=0.0)
    assert play([reading(1.0, mine, calm)], cache())[0].action is Action.TRIM


def test_the_stall_of_a_limit_that_does_not_bite_is_none_of_it():
    """A container beside it thrashes at its own limit; /proc/pressure counts that, and the machine is short
    of nothing."""
    looks = [
        reading(t / 10, machine(2 * GIB, 8 * GIB, some=0.5, full=0.4, bites=False), interval_s=0.1)
        for t in range(600)
    ]
    decisions = play(looks, cache(masked_mib=100))
    assert Action.TRIM not in {d.action for d in decisions}
    assert Action.RESTORE in {d.action for d in decisions}  # nor does it keep anything away


def test_freed_bytes_that_nobody_takes_are_no_relief():
    """The same where nothing tells whose limit it is: a few trims, and not a minute of them."""
    one, rng = Governed("a", 256 * MIB), random.Random(1)
    thrash = [rng.choice([0.0, 0.05, 0.5, 0.9]) for _ in range(600)]
    paper = Paper(8 * GIB, lambda _: 6 * GIB, [one])
    paper.run(60.0, stall=lambda t: thrash[int(t * 10)])
    assert sum(done is Action.TRIM for _, done, _ in one.acts) <= 10
    assert one.live_bytes >= 0.35 * 256 * MIB


def test_a_flickering_stall_does_not_change_the_mode_with_every_tenth_of_a_second():
    rng = random.Random(2)
    looks = [
        reading(
            t / 10, machine(2 * GIB, 8 * GIB, some=rng.choice([0.0, 0.05, 0.5]), full=0.0), interval_s=0.1
        )
        for t in range(600)
    ]
    modes = [d.mode for d in play(looks, cache())]
    assert sum(a is not b for a, b in itertools.pairwise(modes)) <= 60


def test_the_reason_says_whose_limit_it_is():
    slice_ = Level(
        name="/sys/fs/cgroup/user.slice",
        headroom_bytes=0,
        limit_bytes=GIB,
        limit="memory.high",
        some=0.5,
        full=0.0,
    )
    look = reading(1.0, slice_, machine(4 * GIB, 8 * GIB))
    for given in (
        cache(),
        cache(trimmable_mib=0),
    ):  # also at the floor, where it stays for as long as it lasts
        assert "/sys/fs/cgroup/user.slice at memory.high: " in play([look], given)[0].reason


# -- noise -------------------------------------------------------------------------------------------------


def test_a_machine_that_always_stalls_a_little_gets_its_context_back():
    rng = random.Random(3)
    one = Governed("a", 200 * MIB)
    one.live_bytes, one.masked_bytes = 100 * MIB, 100 * MIB
    Paper(8 * GIB, lambda _: 3 * GIB, [one]).run(120.0, stall=lambda _: rng.uniform(0.02, 0.06))
    assert one.masked_bytes == 0


def test_a_short_stall_now_and_then_trims_nothing_also_where_memory_is_tightish():
    """8 GB, 0.65 GB free, a context of 1 GiB, 12 ms of stall every 20 s: 180 trims and 19.6 GB an hour."""
    one = Governed("a", GIB)
    tight = Paper(8 * GB, lambda _: 8 * GB - GIB - 650_000_000, [one])
    tight.run(
        1200.0, stall=lambda t: 0.12 if t % 20 < 0.1 else 0.0
    )  # four times what the noise takes to settle
    assert one.acts == []


def test_bytes_that_go_and_come_back_are_bounded_by_the_hour():
    """Half a second of stall every 20 s, which is pressure: seven swings, and six an hour from then on."""
    one = Governed("a", GIB)
    Paper(8 * GB, lambda _: 8 * GB - GIB - 650_000_000, [one]).run(
        3600.0, stall=lambda t: 0.9 if t % 20 < 0.5 else 0.0
    )
    given = sum(n_bytes for _, done, n_bytes in one.acts if done is Action.TRIM)
    assert one.count(Action.RESTORE) <= 14
    assert given <= 14 * GIB


# -- sizes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("available_gib", "acts"), [(5.0, False), (0.7, False), (0.6, True)])
def test_a_large_machine_is_not_short_with_gigabytes_left(available_gib, acts):
    look = reading(1.0, machine(int(available_gib * GIB), 128 * GIB, some=0.0, full=0.0))
    assert (play([look], cache())[0].action is Action.TRIM) is acts


@pytest.mark.parametrize(("available_gib", "acts"), [(30, False), (5, False), (3, True)])
def test_and_its_stall_counts_from_an_amount_on(available_gib, acts):
    look = reading(1.0, machine(available_gib * GIB, 128 * GIB, some=0.3, full=0.1))
    assert (play([look], cache())[0].action is Action.TRIM) is acts


def test_a_restore_on_a_large_machine_leaves_an_amount_and_not_half():
    """3 GiB above the line: all but 1 GiB of it."""
    looks = [reading(t, machine(640 * MIB + 3 * GIB, 128 * GIB, some=0.0, full=0.0)) for t in range(7)]
    restore = next(d for d in play(looks, cache(4096, 4096)) if d.action is Action.RESTORE)
    assert restore.n_bytes == 2 * GIB


def test_a_tiny_cgroup_on_many_cores_is_not_judged_finer_than_the_kernel_counts():
    """128 processors hold up to 32 MiB that nobody uses; the line of 512 MiB is 20 MiB."""
    own = Level(
        name="/pod", limit_bytes=512 * MIB, headroom_bytes=15 * MIB, grain_bytes=32 * MIB, bites=False
    )
    calm = machine(100 * GIB, 128 * GIB, some=0.0, full=0.0)
    assert play([reading(1.0, own, calm)], cache())[0].action is Action.NONE
    met = msgspec.structs.replace(own, bites=True)
    assert play([reading(1.0, met, calm)], cache())[0].action is Action.TRIM
    jumps = [
        reading(
            t / 50, msgspec.structs.replace(own, headroom_bytes=(90 - 10 * t) * MIB), calm, interval_s=0.02
        )
        for t in range(4)
    ]
    assert {d.action for d in play(jumps, cache())} == {Action.NONE}


# -- a neighbour that takes --------------------------------------------------------------------------------


def test_others_mapped_files_are_room_until_somebody_misses_them():
    """A vector database maps 200 MiB; 39 % of the container seem to be left, of which nothing is free."""
    own = Level(
        name="/pod", limit_bytes=512 * MIB, headroom_bytes=4 * MIB, mapped_bytes=200 * MIB, some=0.0, full=0.0
    )
    assert play([reading(1.0, own)], cache())[0].action is Action.NONE
    missed = msgspec.structs.replace(own, refault_bytes_per_s=20e6, bites=True)
    decision = play([reading(1.0, missed)], cache())[0]
    assert (decision.action, decision.urgent) == (Action.TRIM, False)  # it is slow, and nobody dies of it
    assert play([reading(1.0, msgspec.structs.replace(own, some=0.2))], cache())[0].action is Action.TRIM
    gone = msgspec.structs.replace(own, mapped_bytes=0)
    assert play([reading(1.0, gone)], cache())[0].urgent


def test_a_quick_mapping_is_no_fall():
    looks = [
        reading(
            t / 50,
            Level(
                name="/pod",
                limit_bytes=512 * MIB,
                headroom_bytes=(220 - 20 * t) * MIB,
                mapped_bytes=20 * t * MIB,
                some=0.0,
                full=0.0,
            ),
            interval_s=0.02,
        )
        for t in range(10)
    ]
    assert {d.action for d in play(looks, cache())} == {Action.NONE}


def test_the_line_of_another_program_is_a_level_like_any_other():
    """earlyoom kills at 10 % available: 9 MiB above it is little, though 0.8 GB are free."""
    line = Level(
        name="earlyoom",
        limit="earlyoom kills at 10 % available",
        headroom_bytes=9 * MIB,
        limit_bytes=8 * GB,
        bites=False,
    )
    look = reading(1.0, machine(809 * MIB, 8 * GB, some=0.0, full=0.0), line)
    decision = play([look], cache())[0]
    assert (decision.action, decision.urgent) == (Action.TRIM, True)
    assert "earlyoom kills at 10 % available" in decision.reason


# -- nothing left to give ----------------------------------------------------------------------------------


def test_at_the_floor_it_looks_once_a_second():
    """A turn takes half a millisecond in cold caches: 0.05 % of a core."""
    state = LawState()
    look = one_level(time_s=1.0, interval_s=0.1, some=0.9, full=0.5, headroom_bytes=0, limit_bytes=GIB)
    decision, state = decide(CONFIG, state, look, cache(trimmable_mib=0))
    assert decision.mode is Mode.HOLDING
    assert pause_s(CONFIG, look, state) == 1.0
    decision, state = decide(CONFIG, state, msgspec.structs.replace(look, time_s=2.0), cache())
    assert decision.action is Action.TRIM
    assert pause_s(CONFIG, look, state) == CONFIG.poll_busy_s


def test_there_a_turn_costs_less_than_two_thousandths_of_a_core():
    """Processor time of looking and deciding on this machine, once a second: the best of ten times twenty."""
    source, state = discover().source, LawState()
    source.read()
    turns, took_s = 20, []
    for _ in range(10):
        before_s = time.thread_time()
        for _ in range(turns):
            look = source.read()
            _, state = decide(CONFIG, state, look, cache(trimmable_mib=0))
            pause_s(CONFIG, look, state)
        took_s.append((time.thread_time() - before_s) / turns)
    assert min(took_s) < 0.002 * 1.0
    source.close()


@pytest.mark.parametrize(
    ("headroom", "behind"), [(0.5, False), (0.2, False), (0.07, False), (0.055, True), (0.03, True)]
)
def test_what_is_dirty_is_written_while_the_machine_is_merely_busy(headroom, behind):
    look = reading(1.0, machine(int(headroom * 8 * GIB), 8 * GIB, some=0.0, full=0.0))
    assert play([look], cache())[0].write_behind is behind


def test_without_psi_what_was_given_comes_back_by_headroom_alone():
    looks = [
        reading(float(second), Level(name=MACHINE, headroom_bytes=6 * GIB, limit_bytes=8 * GIB))
        for second in range(30)
    ]
    actions = [decision.action for decision in play(looks, cache(live_mib=100, masked_mib=100))]
    assert Action.RESTORE in actions


def test_where_neither_stall_nor_headroom_is_told_nothing_comes_back():
    looks = [reading(float(second), Level(name=MACHINE)) for second in range(30)]
    actions = [decision.action for decision in play(looks, cache(live_mib=100, masked_mib=100))]
    assert set(actions) == {Action.NONE}
