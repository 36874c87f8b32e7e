"""An answer that was given with cells masked is told of once, when it has ended."""

from __future__ import annotations

import msgspec

from psi_kv_governor.answers import Answers
from psi_kv_governor.cache import CacheState, Range, SequenceState, Snapshot

SEQUENCE = SequenceState(id=3, next_position=100, live=(Range(0, 100),))
CACHE = CacheState(
    id=1,
    name="llama",
    pid=42,
    capacity_cells=512,
    cell_bytes=64,
    row_bytes=64,
    resident_bytes=0,
    maskable=True,
)


def look(answers: Answers, time_s: float, **changed) -> list[tuple[int, int, int, int]]:
    sequence = msgspec.structs.replace(SEQUENCE, **changed)
    cache = msgspec.structs.replace(CACHE, sequences=(sequence,))
    told = answers.ended(Snapshot(time_s=time_s, caches=(cache,)))
    return [(one.pid, one.sequence, one.tokens, one.masked) for one in told]


def test_one_that_had_everything_is_not_told_of():
    answers = Answers()
    assert look(answers, 0, running=True) == look(answers, 1) == []


def test_it_is_told_of_when_it_has_ended_with_the_most_that_was_masked():
    answers = Answers()
    assert look(answers, 0, running=True, affected=2, masked=(Range(10, 60),)) == []
    assert look(answers, 1, running=True, affected=9, masked=(Range(50, 60),)) == []
    assert look(answers, 2, affected=12) == [(42, 3, 12, 50)]
    assert look(answers, 3, affected=12) == []


def test_the_next_one_counts_its_own_tokens():
    answers = Answers()
    look(answers, 0, affected=12, masked=(Range(0, 5),))
    look(answers, 1, running=True, affected=15, masked=(Range(0, 7),))
    assert look(answers, 2, affected=20) == [(42, 3, 8, 7)]


def test_one_that_began_and_ended_between_two_looks_is_told_of():
    answers = Answers()
    look(answers, 0, masked=(Range(0, 8),))
    assert look(answers, 1, affected=4, masked=(Range(0, 8),)) == [(42, 3, 4, 8)]


def test_a_slot_that_holds_another_conversation_begins_anew():
    answers = Answers()
    look(answers, 0, affected=12)
    assert look(answers, 1, running=True, affected=0) == []
    assert look(answers, 2, affected=3, masked=(Range(0, 8),)) == [(42, 3, 3, 8)]


def test_a_slot_that_is_gone_is_forgotten():
    answers = Answers()
    look(answers, 0, affected=12)
    assert list(answers.ended(Snapshot(time_s=1))) == []
    assert look(answers, 2, affected=12) == [(42, 3, 12, 0)]
