"""What the governor wishes, and what becomes of it step by step."""

from vllm_help import BLOCK_BYTES, TOKENS, Clock, SchedulerOnPaper, asked, engine_of, sequences

from psi_kv_governor.cache import Verb
from psi_kv_governor.config import GovernorConfig
from psi_kv_governor.engines.vllm import figures, scheduling
from psi_kv_governor.engines.vllm.figures import added
from psi_kv_governor.engines.vllm.messages import Kind
from psi_kv_governor.engines.vllm.wishes import Wish
from psi_kv_governor.governor import Governor
from psi_kv_governor.policy import get_policy
from psi_kv_governor.pressure.reading import one_level


def test_nothing_is_given_of_a_fresh_pool():
    one = SchedulerOnPaper()
    assert asked(one, Wish(Verb.PARK, n_bytes=1 << 30), Wish(Verb.RELEASE)) == []


def test_cached_blocks_go_least_recently_used_first():
    one = SchedulerOnPaper()
    for name in "abc":
        one.begin(name, 2 * TOKENS)
        one.step()
    table = dict(one.tables)
    for name in "bac":
        one.end(name)
    (order,) = asked(one, Wish(Verb.PARK, n_bytes=3 * BLOCK_BYTES))
    assert order.kind is Kind.PARK
    assert set(order.blocks) == {*table["b"], table["a"][0]}


def test_what_is_ordered_away_is_not_given_twice():
    one = SchedulerOnPaper()
    one.begin("a", 4 * TOKENS)
    one.end("a")
    first = asked(one, Wish(Verb.PARK, n_bytes=1 << 30))
    assert len(first[0].blocks) == 4
    assert asked(one, Wish(Verb.PARK, n_bytes=1 << 30)) == []


def test_a_block_of_no_use_is_released_and_a_cached_one_is_not():
    one = SchedulerOnPaper()
    one.begin("a", TOKENS + 3)
    table = list(one.tables["a"])
    one.end("a")
    (order,) = asked(one, Wish(Verb.RELEASE))
    assert (order.kind, order.blocks) == (Kind.RELEASE, (table[1],))


def test_a_parked_block_that_is_found_again_is_said_to_be_used():
    one = SchedulerOnPaper()
    one.begin("a", 2 * TOKENS)
    table = list(one.tables["a"])
    one.end("a")
    one.side._wishes.append(Wish(Verb.PARK, n_bytes=1 << 30))
    one.answer(one.step())
    assert sequences(one)[0].parked_bytes == 2 * BLOCK_BYTES
    one.begin("b", 2 * TOKENS, shared=table)
    assert set(one.step().used) == set(table)
    assert one.side.ledger.here(table) == table


def test_a_parked_block_that_somebody_writes_anew_is_said_to_be_blank():
    """With a beginning that is found by hash, only what lies behind it."""
    one = SchedulerOnPaper(n_blocks=6)
    one.begin("a", 5 * TOKENS)
    table = list(one.tables["a"])
    one.end("a")
    one.side._wishes.append(Wish(Verb.PARK, n_bytes=1 << 30))
    one.answer(one.step())
    one.begin("b", 3 * TOKENS, shared=table[:1])
    step = one.step()
    assert set(step.blank) == set(one.tables["b"]) - {table[0]}
    assert set(step.used) == set(one.tables["b"])
    assert one.step().blank == ()


def test_a_failed_park_leaves_the_blocks_where_they_are():
    one = SchedulerOnPaper()
    one.begin("a", 2 * TOKENS)
    one.end("a")
    wish = Wish(Verb.PARK, n_bytes=1 << 30)
    one.side._wishes.append(wish)
    one.answer(one.step(), problem="the disk is full")
    assert wish.done.problem == "the disk is full"
    assert len(one.side.free().cached) == 2


def test_an_order_is_over_when_every_rank_has_done_it():
    one = SchedulerOnPaper(ranks=2)
    one.begin("a", TOKENS)
    one.end("a")
    wish = Wish(Verb.PARK, n_bytes=1 << 30)
    one.side._wishes.append(wish)
    step = one.step()
    one.ranks = 1
    one.answer(step)
    assert not wish.over.is_set()
    one.answer(step)
    assert wish.over.is_set()
    assert wish.done.bytes_returned == 2 * BLOCK_BYTES


def test_what_is_being_decoded_is_not_parked_by_hand():
    one = SchedulerOnPaper()
    one.begin("a", TOKENS)
    one.step()
    wish = Wish(Verb.PARK, sequence=1)
    assert asked(one, wish) == []
    assert "being decoded" in wish.done.problem


def test_what_was_parked_is_read_back_last_used_first():
    one = SchedulerOnPaper()
    for name in "ab":
        one.begin(name, TOKENS)
    tables = dict(one.tables)
    for name in "ab":
        one.end(name)
    one.side._wishes.append(Wish(Verb.PARK, n_bytes=1 << 30))
    one.until_idle()
    (order,) = asked(one, Wish(Verb.UNPARK, n_bytes=BLOCK_BYTES))
    assert (order.kind, list(order.blocks)) == (Kind.BACK, tables["b"])


def test_a_pressed_machine_gives_first_what_nobody_uses_and_then_has_a_request_stand_still():
    """The real law and planner on this engine: acute, with little to give but what runs."""
    one = SchedulerOnPaper()
    for name in "abc":
        one.begin(name, 4 * TOKENS)
    one.end("a")
    one.step()
    one.side.wake = lambda: one.until_idle(2)
    governor = Governor(
        engine_of(one),
        source=Gone(),
        policy=get_policy("window"),
        config=GovernorConfig(status_socket=False),
        neighbours=None,
    )
    try:
        for _ in range(4):
            governor.step()
    finally:
        governor.close()
    assert one.held == {"c": True}
    assert not one.side.free().cached


class Gone:
    """A machine of which almost nothing is left; between two readings, the cooldown of a large trim."""

    name = "gone"
    time_s = 0.0

    def read(self):
        self.time_s += 0.12
        return one_level(
            time_s=self.time_s,
            interval_s=0.1,
            some=0.9,
            full=0.8,
            headroom_bytes=1 << 16,
            limit_bytes=1 << 30,
        )

    def close(self):
        pass


def test_figures_are_told_once_a_second_and_amounts_once(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(figures, "time", clock)
    one = SchedulerOnPaper()
    one.begin("a", 2 * TOKENS)
    one.end("a")
    one.side._wishes.append(Wish(Verb.PARK, n_bytes=1 << 30))
    one.until_idle()
    told = one.side.told()
    assert told["returned_bytes"] == told["parked_bytes"] == 2 * BLOCK_BYTES
    assert not one.side.figures.due
    clock.now_s += figures.EVERY_S
    assert one.side.figures.due
    assert one.side.told() == {}  # nothing is new
    one.begin("b", TOKENS)
    assert "returned_bytes" not in one.side.told()


def test_figures_of_two_tellings_are_one():
    one, two = (
        {"returned_bytes": 5, "parked_bytes": 9},
        {"returned_bytes": 2, "parked_bytes": 3, "preemptions": 1},
    )
    assert added(one, two) == {"returned_bytes": 7, "parked_bytes": 3, "preemptions": 1}


def test_a_step_of_those_who_run_already_is_passed_over(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(scheduling, "time", clock)
    one = SchedulerOnPaper()
    one.begin("a", TOKENS)
    assert not one.passes_over()  # it has got blocks
    assert one.passes_over()
    one.side._wishes.append(Wish(Verb.RELEASE))
    assert not one.passes_over()
    one.side.far = True
    one.side.looked_s = clock.now_s
    assert one.passes_over()
    clock.now_s += scheduling._LOOK_S
    assert not one.passes_over()  # the other host has to be looked at
    one.side.far = False
    one.end("a")
    assert not one.passes_over()  # its blocks are free
    assert not one.passes_over()  # without a forward pass, what is open is worked on


def test_while_somebody_stands_still_no_step_is_passed_over():
    one = SchedulerOnPaper()
    one.begin("a", TOKENS)
    one.begin("b", TOKENS)
    one.step()
    assert one.passes_over()
    asked(one, Wish(Verb.MASK, 2))
    one.until_idle()
    assert one.side.requests.still
    assert not one.passes_over()
