"""Part 3: facts hidden in a text, and what of them a trimmed cache still knows.

Two scenes. *known*: the question is in the context when cells are given up, all but its last token (SnapKV's
scene: the last queries of the prompt tell what matters). *later*: the question comes after. The same tokens
are decoded in both; only the time of the trim differs.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np

from psi_kv_governor.errors import BadInputError
from psikv_bench.fidelity.contenders import FULL
from psikv_bench.fidelity.likelihood import Tick
from psikv_bench.fidelity.metrics import agreeing
from psikv_bench.fidelity.plan import Plan
from psikv_bench.fidelity.results import Answers, When
from psikv_bench.fidelity.subject import Subject
from psikv_bench.fidelity.tasks import Counts, Question, questions
from psikv_bench.fidelity.texts import read_text
from psikv_bench.intervals import share_of
from psikv_bench.model import Logits

ABLE = 0.8
"""Least share of a task's questions that the full cache has to answer: below it, a policy could only lose
what the model does not have."""
FIRST_DEPTH, LAST_DEPTH = 0.08, 0.80
"""Where facts are hidden, as shares of the text: behind the sinks, before the protected window."""
_PARAGRAPH = "\n\n"


@dataclass(frozen=True)
class Asked:
    """A question in tokens: what is read, and which of it the model has to say itself."""

    question: Question
    tokens: tuple[int, ...]
    stem: int
    """Tokens of the first stem."""
    answer: frozenset[int]
    """Indices in `tokens` of the answers."""

    def right(self, logits: Logits) -> bool:
        """Whether greedy decoding by `logits`, those after the first stem and on, gives the answer."""
        best = logits.argmax(axis=-1)
        return all(best[index - self.stem] == self.tokens[index] for index in self.answer)


@dataclass(frozen=True)
class Outcome:
    """One question, asked once."""

    task: str
    when: When
    policy: str
    share: float
    right: bool


@dataclass(frozen=True)
class Haystack:
    """A text with facts in it, in tokens, and the questions."""

    tokens: list[int]
    asked: list[Asked]


def haystack(subject: Subject, name: str, counts: Counts, length: int, seed: int) -> Haystack:
    """`length` tokens of the text called `name`, with facts in it as paragraphs of their own.

    Raises BadInputError where the text is too short.
    """
    asked = questions(counts, seed)
    facts = list(dict.fromkeys(fact for question in asked for fact in question.facts))
    random.Random(seed).shuffle(facts)
    text = subject.tokens(read_text(name))
    sentences = [subject.tokens(f"{_PARAGRAPH}{fact}{_PARAGRAPH}") for fact in facts]
    hay = length - len(subject.opening) - sum(map(len, sentences))
    if len(text) < hay:
        raise BadInputError(f"the text {name!r} has {len(text)} tokens, too few to hide facts among {length}")
    tokens, done = list(subject.opening), 0
    for depth, sentence in zip(np.linspace(FIRST_DEPTH, LAST_DEPTH, len(facts)), sentences, strict=True):
        stop = round(depth * hay)
        tokens += text[done:stop] + sentence
        done = stop
    return Haystack(tokens + text[done:hay], [_in_tokens(subject, question) for question in asked])


def _in_tokens(subject: Subject, question: Question) -> Asked:
    """Stems and answers are cut where the tokens of their common text are."""
    said, stem = _PARAGRAPH, 0
    answer: set[int] = set()
    for words, right in question.steps:
        said += words
        with_answer = subject.tokens(f"{said} {right}")
        begin = agreeing(subject.tokens(said), with_answer)
        said += f" {right}"
        answer.update(range(begin, len(with_answer)))
        stem = stem or begin
    return Asked(question, tuple(subject.tokens(said)), stem, frozenset(answer))


def ask(subject: Subject, asked: Asked, already: int = 0) -> bool:
    """Whether it is answered; it is forgotten again. `already`: its first tokens that are in the context."""
    mark = subject.mark()
    logits = subject.asked(asked.tokens[already : asked.stem], asked.tokens[asked.stem : -1])
    subject.back_to(mark)
    return asked.right(logits)


def _haystack(subject: Subject, plan: Plan, number: int) -> Haystack:
    """The texts take turns, each with its own facts."""
    name, counts = plan.texts[number % len(plan.texts)], plan.counts[number % len(plan.counts)]
    return haystack(subject, name, counts, plan.ctx[0], plan.seed + number)


def screen(subject: Subject, plan: Plan, tick: Tick) -> list[Outcome]:
    """Every question with the full cache."""
    found = []
    for number in range(plan.haystacks):
        hay = _haystack(subject, plan, number)
        tick(f"text {number + 1} of {plan.haystacks} with hidden facts: what the full cache finds")
        subject.load(hay.tokens)
        found += [Outcome(one.question.task, "later", FULL, 0.0, ask(subject, one)) for one in hay.asked]
    return found


def able(table: Sequence[Answers]) -> frozenset[str]:
    """The tasks that the full cache can do."""
    return frozenset(line.task for line in table if line.policy == FULL and line.right.mean >= ABLE)


def measure(subject: Subject, plan: Plan, tick: Tick, *, number: int, tasks: frozenset[str]) -> list[Outcome]:
    """Every question of the `tasks` on one text, by every policy and share, in both scenes."""
    hay = _haystack(subject, plan, number)
    asked = [one for one in hay.asked if one.question.task in tasks]
    if not asked:
        return []
    what = f"text {number + 1} of {plan.haystacks} with hidden facts"
    tick(f"{what}: reading")
    subject.load(hay.tokens)
    mark = subject.mark()
    found = []
    for share, policy in product(plan.shares, plan.compared):
        tick(f"{what}: asked after {policy.name} gave up {share:.0%}")
        with subject.trimmed(policy, share):
            for one in asked:
                right = ask(subject, one)
                found.append(Outcome(one.question.task, "later", policy.name, share, right))
    for one in asked:
        tick(f"{what}: {one.question.steps[0][0]} ...")
        already = one.stem - 1
        subject.read(one.tokens[:already])
        for share, policy in product(plan.shares, plan.compared):
            with subject.trimmed(policy, share):
                right = ask(subject, one, already)
            found.append(Outcome(one.question.task, "known", policy.name, share, right))
        subject.back_to(mark)
    return found


def summed(outcomes: Sequence[Outcome]) -> list[Answers]:
    """By task, scene, policy and share; the seeds of a policy count as further trials."""
    groups: dict[tuple[str, When, str, float], list[bool]] = {}
    for one in outcomes:
        groups.setdefault((one.task, one.when, one.policy, one.share), []).append(one.right)
    return [
        Answers(task=task, when=when, policy=policy, share=share, right=share_of(sum(right), len(right)))
        for (task, when, policy, share), right in groups.items()
    ]
