"""Whoever makes or uses the `Llama`: answers and logits are those without us, whatever is parked."""

from __future__ import annotations

import pytest
from subjects import COLOURS, SUBJECTS

pytestmark = [pytest.mark.llama, pytest.mark.timeout(5500)]  # the first of them plays three times
every_framework = pytest.mark.parametrize("name", SUBJECTS)
either_backing = pytest.mark.parametrize("way", ["file", "memory"])


@every_framework
@either_backing
def test_answers_and_logits_are_those_without_us_before_during_and_after_parking(played, name, way):
    ours, theirs = played[way][name], played["plain"][name]
    assert "error" not in theirs, theirs["error"]
    assert "error" not in ours, ours["error"]
    assert ours["answers"] == theirs["answers"]
    assert all(text.strip() for text, _ in ours["answers"])
    assert ours["returned"] > 1 << 18  # it was parked, and read back


def test_an_answer_has_the_form_that_was_asked_for(played):
    """Each token's logits went through the framework's own code, with us as without."""
    for text, _ in played["file"]["outlines"]["answers"]:
        *words, last = text.split(" ")
        assert set(words) <= set(COLOURS), text
        assert any(colour.startswith(last) for colour in COLOURS), text


COMPUTES_ALL_AGAIN = {"outlines"}
"""It resets the model before each request, so that nothing of its context stays masked."""


@every_framework
@either_backing
def test_after_masking_it_is_said_what_the_result_was_computed_without(played, name, way):
    said = played[way][name]["said"]
    if name in COMPUTES_ALL_AGAIN:
        assert said == {}
        assert played[way][name]["last"] == played["plain"][name]["last"]
    else:
        assert said["masked_tokens"] == 50
        assert said["affected_tokens"] > 0


def test_a_framework_that_hands_the_result_on_has_it_in_there(played):
    """LlamaIndex has upstream's result in `raw`; the types of `llama_cpp.server` leave it out."""
    assert played["file"]["llama_index"]["handed_on"]["masked_tokens"] == 50
