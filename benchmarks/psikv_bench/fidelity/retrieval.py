"""Part 3: facts hidden in a text, and what of them a trimmed cache still knows.

Two scenes. *known*: the question is in the context when cells are given up, all but its last token (SnapKV's
scene: the last queries of the prompt tell what matters). *later*: the question comes after. The same tokens
are decoded in both; only the time of the trim differs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from psi_kv_governor.errors import BadInputError
from psikv_bench.fidelity.contenders import FULL
from psikv_bench.fidelity.likelihood import Tick, policies
from psikv_bench.fidelity.plan import Plan
from psikv_bench.fidelity.results import Retrieval, Task, When
from psikv_bench.fidelity.subject import Subject
from psikv_bench.fidelity.tasks import ABOUT, Fact, Question, depths, facts, questions
from psikv_bench.fidelity.texts import read_text
from psikv_bench.intervals import Share, share_of
from psikv_bench.model import Logits

ABLE = 0.8
"""Least share of a task's questions that the full cache has to answer: below it, a policy could only lose
what the model does not have."""
THIRDS = ("early", "middle", "late")
_FIRST_DEPTH, _LAST_DEPTH = 0.08, 0.80
"""Where facts are hidden, as shares of the text: behind the sinks, before the protected window."""
_PARAGRAPH = "\n\n"


@dataclass(frozen=True)
class Asked:
    """A question in tokens: what is read, and which of it the model has to say itself."""

    question: Question
    third: str
    tokens: tuple[int, ...]
    stem: int
    """Tokens of the first stem."""
    answer: frozenset[int]
    """Indices in `tokens` of the answers."""

    def right(self, logits: Logits, start: int) -> bool:
        """Whether greedy decoding by `logits`, those after tokens[start] and on, gives the answer."""
        best = logits.argmax(axis=-1)
        return all(best[index - 1 - start] == self.tokens[index] for index in self.answer)


@dataclass(frozen=True)
class Outcome:
    """One question, asked once."""

    task: str
    third: str
    when: When
    policy: str
    share: float
    right: bool


@dataclass(frozen=True)
class Haystack:
    """A text with facts in it, in tokens, and the questions."""

    name: str
    tokens: list[int]
    asked: list[Asked]


def haystacks(subject: Subject, plan: Plan) -> Iterator[Haystack]:
    """The texts in turn, each with its own facts. Raises BadInputError when one is too short."""
    for i in range(plan.haystacks):
        name = plan.texts[i % len(plan.texts)]
        asked = questions(plan.counts[i % len(plan.counts)], plan.seed + i)
        hidden = facts(asked, plan.seed + i)
        text = subject.tokens(read_text(name))
        tokens, where = _hide(subject, text, hidden, plan.haystack_tokens, name)
        yield Haystack(name, tokens, [_in_tokens(subject, question, where) for question in asked])


def _hide(
    subject: Subject, text: list[int], hidden: list[Fact], length: int, name: str
) -> tuple[list[int], dict[Fact, float]]:
    """`length` tokens with the facts as paragraphs of their own; and the depth of each."""
    sentences = [subject.tokens(f"{_PARAGRAPH}{fact.sentence}{_PARAGRAPH}") for fact in hidden]
    hay = length - len(subject.opening) - sum(map(len, sentences))
    if len(text) < hay:
        raise BadInputError(f"the text {name!r} has {len(text)} tokens, too few to hide facts among {length}")
    where = dict(zip(hidden, depths(len(hidden), _FIRST_DEPTH, _LAST_DEPTH), strict=True))
    tokens, done = list(subject.opening), 0
    for depth, sentence in zip(where.values(), sentences, strict=True):
        stop = round(depth * hay)
        tokens += text[done:stop] + sentence
        done = stop
    return tokens + text[done:hay], where


def _in_tokens(subject: Subject, question: Question, where: dict[Fact, float]) -> Asked:
    """Stems and answers are cut where the tokens of their common text are."""
    said, stem = _PARAGRAPH, 0
    answer: set[int] = set()
    for step in question.steps:
        said += step.stem
        begin = len(_common(subject.tokens(said), subject.tokens(f"{said} {step.answer}")))
        said += f" {step.answer}"
        answer.update(range(begin, len(subject.tokens(said))))
        stem = stem or begin
    depth = where[question.facts[0]]
    third = THIRDS[min(2, int((depth - _FIRST_DEPTH) / (_LAST_DEPTH - _FIRST_DEPTH) * 3))]
    return Asked(question, third, tuple(subject.tokens(said)), stem, frozenset(answer))


def _common(left: list[int], right: list[int]) -> list[int]:
    """The tokens that both begin with."""
    count = next(
        (i for i, pair in enumerate(zip(left, right, strict=False)) if pair[0] != pair[1]), len(left)
    )
    return left[:count]


# -- with the full cache -----------------------------------------------------------------------------------


def screen(subject: Subject, plan: Plan, tick: Tick) -> list[Outcome]:
    """Every question with the full cache."""
    found = []
    for number, hay in enumerate(haystacks(subject, plan), 1):
        tick(f"text {number} of {plan.haystacks} with hidden facts: what the full cache finds")
        subject.load(hay.tokens)
        found += [_ask(subject, asked, "later", FULL, 0.0) for asked in hay.asked]
    return found


def tasks(screened: Sequence[Outcome]) -> list[Task]:
    """What the full cache can do, task by task."""
    table = []
    for name, about in ABOUT.items():
        if right := [outcome.right for outcome in screened if outcome.task == name]:
            full = share_of(sum(right), len(right))
            table.append(Task(name=name, about=about, full=full, able=full.mean >= ABLE))
    return table


def _ask(
    subject: Subject, asked: Asked, when: When, policy: str, share: float, *, already: int = 0
) -> Outcome:
    """Ask, and forget it again. The first `already` tokens of the question are in the context."""
    mark = subject.mark()
    logits = subject.asked(asked.tokens[already : asked.stem], asked.tokens[asked.stem : -1])
    subject.back_to(mark)
    right = asked.right(logits, already)
    return Outcome(asked.question.task, asked.third, when, policy, share, right)


# -- with trimmed ones -------------------------------------------------------------------------------------


def measure(subject: Subject, plan: Plan, number: int, able: frozenset[str], tick: Tick) -> list[Outcome]:
    """Every question of the tasks in `able` on one text, by every policy and share, in both scenes."""
    hay = next(islice(haystacks(subject, plan), number, None))
    asked = [one for one in hay.asked if one.question.task in able]
    if not asked:
        return []
    what = f"text {number + 1} of {plan.haystacks} with hidden facts"
    tick(f"{what}: reading")
    subject.load(hay.tokens)
    return [*_later(subject, plan, asked, tick, what), *_known(subject, plan, asked, tick, what)]


def _later(subject: Subject, plan: Plan, asked: list[Asked], tick: Tick, what: str) -> Iterator[Outcome]:
    mark = subject.mark()
    for share in plan.shares:
        for policy in policies(plan):
            tick(f"{what}: asked after {policy.name} gave up {share:.0%}")
            with subject.trimmed(policy, share):
                yield from [_ask(subject, one, "later", policy.name, share) for one in asked]
    subject.back_to(mark)


def _known(subject: Subject, plan: Plan, asked: list[Asked], tick: Tick, what: str) -> Iterator[Outcome]:
    mark = subject.mark()
    for one in asked:
        tick(f"{what}: {one.question.steps[0].stem} ...")
        already = one.stem - 1
        subject.read(one.tokens[:already])
        for share in plan.shares:
            for policy in policies(plan):
                with subject.trimmed(policy, share):
                    yield _ask(subject, one, "known", policy.name, share, already=already)
        subject.back_to(mark)


def summed(outcomes: Sequence[Outcome]) -> list[Retrieval]:
    """By task, scene, policy and share; the seeds of a policy count as further trials."""
    groups: dict[tuple[str, When, str, float], list[Outcome]] = {}
    for outcome in outcomes:
        key = (outcome.task, outcome.when, outcome.policy, outcome.share)
        groups.setdefault(key, []).append(outcome)
    return [
        Retrieval(
            task=task,
            when=when,
            policy=policy,
            share=share,
            all=share_of(sum(outcome.right for outcome in group), len(group)),
            by_depth=_by_depth(group),
        )
        for (task, when, policy, share), group in groups.items()
    ]


def _by_depth(group: Sequence[Outcome]) -> dict[str, Share]:
    return {
        third: share_of(sum(right), len(right))
        for third in THIRDS
        if (right := [outcome.right for outcome in group if outcome.third == third])
    }
