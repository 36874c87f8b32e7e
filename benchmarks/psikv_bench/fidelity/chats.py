"""Part 4: chats in which the governor itself gives up cells between the turns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from psi_kv_governor.errors import BadInputError, PsiKvError
from psi_kv_governor.events import Event, Trimmed
from psi_kv_governor.policy import Policy
from psi_kv_governor.pressure.reading import Reading, one_level
from psikv_bench.fidelity.contenders import FULL
from psikv_bench.fidelity.conversation import Chat, Message, Planted, chat, renderer, stem_of
from psikv_bench.fidelity.likelihood import Tick, policies
from psikv_bench.fidelity.plan import Plan
from psikv_bench.fidelity.results import Conversation
from psikv_bench.fidelity.subject import Subject
from psikv_bench.intervals import share_of

_TURNS_UNDER_PRESSURE = 4
"""The share is given up over so many turns."""
_STALLS = (0.3, 0.05)
"""What the governor reads by turns while it is to trim: well above its threshold, and then relief, since it
takes trims that bring none as futile and holds back."""
_READINGS = 200
"""A trim takes about a tenth of what may go, so forty readings are enough for any share."""


class ScriptedPressure:
    """A machine that is short of memory at every second look, a second after the last one."""

    name = "scripted"

    def __init__(self) -> None:
        self._time_s = 0.0

    def read(self) -> Reading:
        """See PressureSource."""
        stall = _STALLS[int(self._time_s) % len(_STALLS)]
        self._time_s += 1.0
        return one_level(time_s=self._time_s, interval_s=1.0, some=stall, full=stall, source=self.name)

    def close(self) -> None:
        """See PressureSource."""


@dataclass(frozen=True)
class Talk:
    """What one chat gave under one policy."""

    policy: str
    share: float
    given_up: float
    trims: int
    right: list[bool]


@dataclass(frozen=True)
class Script:
    """A chat in tokens: what all policies read with the full cache, the turns between which the governor
    acts, and the questions."""

    opening: list[int]
    turns: list[list[int]]
    asked: list[tuple[Planted, list[int]]]

    @property
    def length(self) -> int:
        """Tokens of the chat with its longest question."""
        read = len(self.opening) + sum(map(len, self.turns))
        return read + max(len(stem) for _, stem in self.asked)


def measure(subject: Subject, plan: Plan, number: int, tick: Tick) -> list[Talk]:
    """One chat under every policy and share, and with the full cache."""
    what = f"chat {number + 1} of {plan.chats}"
    tick(f"{what}: facts and chatter")
    text = plan.texts[number % len(plan.texts)]
    script = _script(subject, chat(plan.seed + number, text, plan.chat_tokens), plan.chat_tokens)
    subject.forget()
    subject.read(script.opening)
    mark = subject.mark()
    for turn in script.turns:
        subject.read(turn)
    talks = [Talk(FULL, 0.0, 0.0, 0, _answers(subject, script))]
    for share in plan.shares:
        for policy in policies(plan):
            subject.back_to(mark)
            tick(f"{what}: {policy.name} gives up {share:.0%}")
            talks.append(_under_pressure(subject, script, policy, share))
    return talks


def _script(subject: Subject, spoken: Chat, length: int) -> Script:
    render = renderer(subject.template)
    messages: list[Message] = [*spoken.opening, *(said for turn in spoken.early for said in turn)]
    ends = [render(messages)]
    turns = iter(spoken.late)
    while len(ends) <= _TURNS_UNDER_PRESSURE or len(subject.tokens(ends[-1])) < length:
        turn = next(turns, None)
        if turn is None:
            raise PsiKvError(f"the text is too short for a chat of {length} tokens")
        messages += turn
        ends.append(render(messages))
    first = len(ends) - 1 - _TURNS_UNDER_PRESSURE
    if not all(after.startswith(before) for before, after in pairwise(ends)):
        raise PsiKvError("the model's chat template changes earlier turns when later ones come")
    parts = [after[len(before) :] for before, after in pairwise(ends[first:])]
    script = Script(
        opening=subject.tokens(ends[first]),
        turns=[subject.tokens(part) for part in parts],
        asked=[(fact, subject.tokens(stem_of(render, messages, fact))) for fact in spoken.planted],
    )
    if script.length > subject.n_ctx:
        raise BadInputError(
            f"the chat takes {script.length} tokens of this model: measure longer contexts (--ctx), or "
            "leave it out (--only)"
        )
    return script


def _under_pressure(subject: Subject, script: Script, policy: Policy, share: float) -> Talk:
    mark = subject.mark()
    trims: list[Trimmed] = []

    def note(event: Event) -> None:
        if isinstance(event, Trimmed):
            trims.append(event)

    with subject.recalling(policy), subject.governed(policy, ScriptedPressure()) as governor:
        governor.subscribe(note)
        for number, turn in enumerate(script.turns, 1):
            goal = share * number / len(script.turns)
            for _ in range(_READINGS):
                if subject.missing_share() >= goal:
                    break
                governor.step()
            else:
                raise PsiKvError(f"the governor gave up {subject.missing_share():.0%} and not {goal:.0%}")
            subject.read(turn)
        answers = _answers(subject, script)
        talk = Talk(policy.name, share, subject.missing_share(), len(trims), answers)
        subject.back_to(mark)
        subject.unmask()  # before the governor is closed
    return talk


def _answers(subject: Subject, script: Script) -> list[bool]:
    return [_right(subject, fact, stem) for fact, stem in script.asked]


def _right(subject: Subject, fact: Planted, stem: Sequence[int]) -> bool:
    """Whether the first token of the right answer is more probable than those of the other choices."""
    mark = subject.mark()
    logits = subject.asked(stem, ())[-1]
    subject.back_to(mark)
    return max(fact.choices, key=lambda choice: logits[subject.tokens(f" {choice}")[0]]) == fact.answer


def summed(talks: Sequence[Talk]) -> list[Conversation]:
    """By policy and share; the seeds of a policy count as further chats."""
    groups: dict[tuple[str, float], list[Talk]] = {}
    for talk in talks:
        groups.setdefault((talk.policy, talk.share), []).append(talk)
    return [
        Conversation(
            policy=policy,
            share=share,
            given_up=sum(talk.given_up for talk in group) / len(group),
            trims=sum(talk.trims for talk in group) / len(group),
            right=share_of(sum(sum(talk.right) for talk in group), sum(len(talk.right) for talk in group)),
        )
        for (policy, share), group in groups.items()
    ]
