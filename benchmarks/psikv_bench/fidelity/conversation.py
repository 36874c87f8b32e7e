"""The chat of part 4: facts said early, chatter after, questions at the end. Synthetic, seeded."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from psi_kv_governor.errors import BadInputError
from psikv_bench.fidelity.texts import read_text

Message = dict[str, str]
Render = Callable[[Sequence[Message]], str]
"""Messages to the text that a model reads, without the opening of an answer."""

SYSTEM = "You are a helpful assistant who remembers what the user said."
QUESTION = "What did I ask you to remember?"
"""The same for every fact: a question with the words of its fact would be copied instead of the fact."""

FACTS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("The lighthouse keeper's name is", ("Ambrose", "Gilbert", "Winston", "Ophelia")),
    ("The password of the wine cellar is", ("umbrella", "lantern", "mountain", "silver")),
    ("The old violin was made in", ("Lisbon", "Dublin", "Vienna", "Prague")),
    ("The secret ingredient of the soup is", ("cinnamon", "ginger", "honey", "garlic")),
    ("The treasure is buried under the", ("fountain", "bridge", "church", "kitchen")),
    ("The doctor's favourite animal is the", ("penguin", "tiger", "rabbit", "elephant")),
    ("The colour of the submarine is", ("yellow", "purple", "orange", "green")),
    ("The meeting with the bishop is on", ("Thursday", "Sunday", "Tuesday", "Saturday")),
)
"""Each with four answers to choose from, so that a guess is right in one of four."""
_TURNS = 16
"""Of chatter, about: one after each fact, and as many after all."""
_CHARACTERS_PER_TOKEN = 4


@dataclass(frozen=True)
class Planted:
    """A fact, and what to choose its answer from."""

    stem: str
    answer: str
    choices: tuple[str, ...]


@dataclass(frozen=True)
class Chat:
    """Messages with the facts, and the turns of chatter that follow, each a user's message and its answer."""

    planted: list[Planted]
    opening: list[Message]
    chatter: list[list[Message]]


def chat(seed: int, text: str, length: int = 2048) -> Chat:
    """A chat of about `length` tokens whose chatter is made of the text called `text`; the facts are said in
    its first turns, with a turn of chatter after each. Raises BadInputError for an unknown text."""
    rng = random.Random(seed)
    planted = [Planted(stem, rng.choice(choices), choices) for stem, choices in rng.sample(FACTS, len(FACTS))]
    words = re.sub(r"\s+", " ", read_text(text))
    size = length * _CHARACTERS_PER_TOKEN // _TURNS
    pieces = [words[i : i + size] for i in range(0, len(words), size)]
    chatter = [
        _turn("Please read on." if i else "Please read to me.", piece) for i, piece in enumerate(pieces)
    ]
    opening: list[Message] = [{"role": "system", "content": SYSTEM}]
    for fact in planted:
        opening += [*_telling(fact), *chatter.pop(0)]
    return Chat(planted, opening, chatter)


def _telling(fact: Planted) -> list[Message]:
    sentence = f"{fact.stem} {fact.answer}."
    return _turn(f"Please remember this: {sentence[0].lower()}{sentence[1:]}", f"I will. {sentence}")


def _turn(user: str, assistant: str) -> list[Message]:
    return [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]


def renderer(template: str | None) -> Render:
    """How this model reads messages: by its own chat template (Jinja), or as ChatML without one.

    Raises BadInputError for a template that can't be used.
    """
    from llama_cpp.llama_chat_format import CHATML_CHAT_TEMPLATE, Jinja2ChatFormatter

    try:
        formatter = Jinja2ChatFormatter(
            template or CHATML_CHAT_TEMPLATE, eos_token="", bos_token="", add_generation_prompt=False
        )
        formatter(messages=_turn("", ""))
    except Exception as error:  # somebody else's template: whatever it raises, it can't be used
        raise BadInputError(f"the model's chat template can't be used: {error}".splitlines()[0]) from None
    return lambda messages: str(formatter(messages=list(messages)).prompt)


def added(before: str, after: str) -> str:
    """What `after` says more than `before`. Raises BadInputError where it begins otherwise."""
    if not after.startswith(before):
        raise BadInputError("the model's chat template changes earlier turns when later ones come")
    return after[len(before) :]


def stem_of(render: Render, before: Sequence[Message], fact: Planted) -> str:
    """The text of the question after the messages `before`, up to where its answer begins.

    Raises BadInputError where the template does not let a chat be continued.
    """
    marker = " \N{SECTION SIGN}"
    whole = render([*before, *_turn(QUESTION, fact.stem + marker)])
    stem, found, _ = added(render(before), whole).rpartition(marker)
    if not found:
        raise BadInputError("the model's chat template leaves out what an answer begins with")
    return stem
