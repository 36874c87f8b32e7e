"""Questions about facts that were hidden in a text: synthetic, seeded, and short enough for a small model.

Each is scored by greedy decoding: it is right when the most probable token is the right one at every token
of the answer. The stem of a question repeats the words of its fact, so that a model that can copy what it
sees (an induction head) can answer; what is asked is whether the fact is still in the cache, not whether the
model is clever.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import msgspec

ABOUT = {
    "needle": "one fact of its kind in the text",
    "keys": "facts that differ in their key alone",
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
    keys: int = 0
    chains: int = 0

    def __post_init__(self) -> None:
        if self.needles > len(_NEEDLES) or self.keys + 2 * self.chains > len(_CITIES):
            raise ValueError(f"{self} asks for more facts than there are")


@dataclass(frozen=True)
class Question:
    """What is asked."""

    task: str
    steps: tuple[tuple[str, str], ...]
    """Stems, each with the answer that the model has to give, and sees when the next one is asked."""
    facts: tuple[str, ...]
    """Sentences to hide in the text, in the order of their use."""


def questions(counts: Counts, seed: int) -> list[Question]:
    """The questions of one text. The same seed gives the same ones."""
    rng = random.Random(seed)
    cities, words = rng.sample(_CITIES, len(_CITIES)), rng.sample(_WORDS, len(_WORDS))
    asked = []
    for stem, answers in rng.sample(_NEEDLES, counts.needles):
        answer = rng.choice(answers)
        asked.append(Question("needle", ((stem, answer),), (f"{stem} {answer}.",)))
    for _ in range(counts.keys):
        key, value = cities.pop(), words.pop()
        asked.append(Question("keys", ((f"{key} =", value),), (_said(key, value),)))
    for _ in range(counts.chains):
        first, second, value = cities.pop(), cities.pop(), words.pop()
        facts = (_said(first, second), _said(second, value))
        written_out = ((f"{first} =", second), (f".\n\n{second} =", value))
        asked.append(Question("steps", written_out, facts))
        asked.append(Question("chain", ((f"In the end, {first} =", value),), facts))
    return asked


def _said(key: str, value: str) -> str:
    # Three times, the key right before the value: of 28 such questions at 2,048 tokens the demo model
    # answers 24. Of 12 with "The word that goes with KEY: KEY VALUE", said once, it answers 9, and about half
    # with "The password for KEY is VALUE".
    return " ".join([f"{key} = {value}."] * 3)
