"""An engine's plans: when an idle one makes steps, and what the workers do of what was asked."""

import threading

from vllm_help import BLOCK_BYTES, TOKENS, Clock, SchedulerOnPaper, asked, engine_of

from psi_kv_governor.cache import Plan, Range, Step, Verb
from psi_kv_governor.engines.vllm import engine as engine_module
from psi_kv_governor.engines.vllm import scheduling
from psi_kv_governor.engines.vllm.messages import About, Report
from psi_kv_governor.engines.vllm.wishes import Wish
from waiting import PATIENCE_S


def test_an_idle_engine_makes_no_step_for_nothing():
    one = SchedulerOnPaper()
    assert not one.side.pending()
    one.side._wishes.append(Wish(Verb.RELEASE))
    assert one.side.pending()
    one.until_idle()
    assert not one.side.pending()


def test_an_engine_whose_workers_say_nothing_yet_makes_steps():
    one = SchedulerOnPaper()
    one.side._ready = False
    assert one.side.pending()
    assert one.step().look


def test_a_block_is_as_large_as_on_the_host_where_it_has_least():
    one = SchedulerOnPaper(ranks=3)
    about = {0: About("one", 1, 100), 1: About("one", 2, 100), 2: About("two", 3, 150)}
    one.side.report(Report(about=about))
    assert one.side.block_bytes == 150


def test_a_plan_is_carried_out_by_the_next_steps_and_counted_by_the_workers():
    one = SchedulerOnPaper()
    one.begin("a", 4 * TOKENS)
    one.end("a")
    one.step()
    one.side.wake = one.until_idle  # what wakes the engine makes it step
    engine = engine_of(one)
    snapshot = engine.snapshot()
    (idle,) = snapshot.caches[0].sequences
    assert (idle.live_cells, idle.parked_bytes, idle.running) == (4 * TOKENS, 0, False)
    ranges = (Range(0, 2 * TOKENS),)
    result = engine.apply(Plan(steps=(Step(verb=Verb.PARK, cache=0, sequence=0, ranges=ranges),)))
    assert (result.bytes_returned, result.cells, result.done) == (2 * BLOCK_BYTES, 2 * TOKENS, True)
    again = engine.apply(
        Plan(steps=(Step(verb=Verb.PARK, cache=0, sequence=0, ranges=(Range(0, 3 * TOKENS),)),))
    )
    assert again.bytes_returned == BLOCK_BYTES  # what is parked already stands first, and costs nothing


def test_a_plan_that_no_step_comes_for_says_that_it_is_not_done():
    one = SchedulerOnPaper()
    one.begin("a", TOKENS)
    one.end("a")
    plan = Plan(steps=(Step(verb=Verb.PARK, cache=0, sequence=0),), deadline_s=0.1)
    assert not engine_of(one).apply(plan).done


def test_what_came_after_a_plan_had_to_end_counts_with_the_next():
    one = SchedulerOnPaper()
    one.begin("a", 2 * TOKENS)
    one.end("a")
    plan = Plan(steps=(Step(verb=Verb.PARK, cache=0, sequence=0),), deadline_s=0.1)
    engine = engine_of(one)
    assert engine.apply(plan).bytes_returned == 0
    one.until_idle()  # a step takes longer than the plan had
    assert engine.apply(Plan(steps=())).bytes_returned == 2 * BLOCK_BYTES
    assert engine.apply(Plan(steps=())).bytes_returned == 0


def test_what_the_workers_are_doing_is_waited_for(monkeypatch):
    monkeypatch.setattr(engine_module, "PATIENCE_S", PATIENCE_S)
    one = SchedulerOnPaper()
    one.begin("a", 2 * TOKENS)
    one.end("a")

    def wake() -> None:
        threading.Timer(1.0, one.answer, [one.step()]).start()  # after the plan's own time

    one.side.wake = wake
    plan = Plan(steps=(Step(verb=Verb.PARK, cache=0, sequence=0),), deadline_s=0.1)
    assert engine_of(one).apply(plan).bytes_returned == 2 * BLOCK_BYTES


def test_blocks_that_a_working_engine_gives_away_next_are_left_to_it(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(engine_module, "time", clock)
    monkeypatch.setattr(scheduling, "time", clock)
    one = SchedulerOnPaper()
    one.begin("a", TOKENS - 1)
    one.step()
    one.end("a")
    (cache,) = engine_of(one).snapshot().caches
    assert cache.free_resident_bytes == cache.free_soon_used_bytes == BLOCK_BYTES
    clock.now_s += engine_module.WORKS_S
    (cache,) = engine_of(one).snapshot().caches
    assert (cache.free_resident_bytes, cache.free_soon_used_bytes) == (BLOCK_BYTES, 0)


def test_closing_lets_everybody_go_on():
    one = SchedulerOnPaper()
    for name in "ab":
        one.begin(name, TOKENS)
    one.step()
    asked(one, Wish(Verb.MASK, 2))
    engine_of(one).close()
    assert one.held == {"b": False}
