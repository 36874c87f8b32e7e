"""Questions about facts that were hidden in a text: synthetic, seeded, and short enough for a small model.

Each is scored by greedy decoding: it is right when the most probable token is the right one at every token
of the answer. The stem of a question repeats the words of its fact, so that a model that can copy what it
sees (an induction head) can answer; what is asked is whether the fact is still in the cache, not whether the
model is clever.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

ABOUT = {
    "needle": "one fact of its kind in the text",
    "keys": "six facts that differ in their key alone",
    "steps": "two facts in a chain, the steps written out",
    "chain": "two facts in a chain, asked at once",
}
"""The tasks by name: single needle, several keys, variable tracking with and without its steps."""

_NEEDLES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("The lighthouse keeper's name is", ("Ambrose", "Gilbert", "Winston", "Ophelia")),
    ("The train to Geneva leaves from platform", ("17", "23", "12", "31")),
    ("The password of the wine cellar is", ("umbrella", "lantern", "mountain", "silver")),
    ("The old violin was made in", ("Lisbon", "Dublin", "Vienna", "Prague")),
    ("The secret ingredient of the soup is", ("cinnamon", "ginger", "honey", "garlic")),
    ("The treasure is buried under the", ("fountain", "bridge", "church", "kitchen")),
    ("Doctor Miller's favourite animal is the", ("penguin", "tiger", "rabbit", "elephant")),
    ("The colour of the submarine is", ("yellow", "purple", "orange", "green")),
    ("The captain's ship is called the", ("Victory", "Phoenix", "Liberty", "Falcon")),
    ("The mayor plays the", ("piano", "violin", "guitar", "trumpet")),
    ("The meeting with the bishop is on", ("Thursday", "Sunday", "Tuesday", "Saturday")),
    ("The champion of the chess club is", ("Margaret", "Frederick", "Harold", "Beatrice")),
)
_CITIES = ("London", "Madrid", "Berlin", "Vienna", "Paris", "Oslo", "Cairo", "Lima", "Tokyo", "Delhi",
           "Rome", "Athens", "Moscow", "Boston", "Dublin", "Havana")  # fmt: skip
_WORDS = ("umbrella", "lantern", "mountain", "piano", "tiger", "silver", "garden", "rocket", "window",
          "bottle", "candle", "hammer", "apple", "desert", "helmet", "ticket")  # fmt: skip


class Counts(msgspec.Struct, frozen=True, kw_only=True):
    """How many questions of each kind one text gets."""

    needles: int
    keys: int
    chains: int

    def __post_init__(self) -> None:
        if self.needles > len(_NEEDLES) or self.keys + 2 * self.chains > len(_CITIES):
            raise ValueError(f"{self} asks for more facts than there are")


@dataclass(frozen=True)
class Fact:
    """A sentence to hide in the text."""

    sentence: str


@dataclass(frozen=True)
class Question:
    """What is asked: stems and, after each, the answer that the model has to give."""

    task: str
    steps: tuple[tuple[str, str], ...]
    """Stem and answer of each step. The model sees the right answers of the steps before."""
    facts: tuple[Fact, ...]
    """What has to be known for it, in the order of its use."""


def questions(counts: Counts, seed: int) -> list[Question]:
    """The questions of one text. The same seed gives the same ones."""
    rng = random.Random(seed)
    cities, words = rng.sample(_CITIES, len(_CITIES)), rng.sample(_WORDS, len(_WORDS))
    asked = _needles(rng, counts.needles)
    for _ in range(counts.keys):
        asked.append(_key("keys", cities.pop(), words.pop()))
    for _ in range(counts.chains):
        asked.extend(_chain(cities.pop(), cities.pop(), words.pop()))
    return asked


def facts(asked: Sequence[Question], seed: int) -> list[Fact]:
    """The facts that the questions rest on, each once, shuffled: the order in which they are hidden."""
    every = list(dict.fromkeys(fact for question in asked for fact in question.facts))
    random.Random(seed).shuffle(every)
    return every


def _needles(rng: random.Random, count: int) -> list[Question]:
    chosen = rng.sample(_NEEDLES, count)
    return [_plain("needle", stem, rng.choice(answers)) for stem, answers in chosen]


def _plain(task: str, stem: str, answer: str) -> Question:
    return Question(task, ((stem, answer),), (Fact(f"{stem} {answer}."),))


def _key(task: str, key: str, value: str) -> Question:
    # The key stands right before the value: a model of 135 million parameters then finds nine in ten, and
    # fewer than half with "The password for KEY is VALUE".
    return _plain(task, f"The word that goes with {key}: {key}", value)


def _chain(first: str, second: str, value: str) -> list[Question]:
    """`first` is paired with `second`, whose word is `value`: with the steps written out, and at once."""
    pair = Fact(f"{first} is paired with {second}.")
    end = _key("steps", second, value)
    steps = ((f"{first} is paired with", second), (f". {end.steps[0][0]}", value))
    at_once = ((f"{first} is paired with the city whose word is", value),)
    needed = (pair, *end.facts)
    return [Question("steps", steps, needed), Question("chain", at_once, needed)]


def depths(count: int, first: float, last: float) -> list[float]:
    """`count` depths, as shares of the text, evenly from `first` to `last`."""
    step = (last - first) / max(1, count - 1)
    return [first + i * step for i in range(count)]
