"""Part 4: chats in which the governor itself gives up cells between the turns."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise, product

from psi_kv_governor.errors import BadInputError, PsiKvError
from psi_kv_governor.governor import Governor
from psi_kv_governor.policy import Policy
from psi_kv_governor.pressure.reading import Reading, one_level
from psikv_bench.fidelity.contenders import FULL
from psikv_bench.fidelity.conversation import Planted, added, chat, renderer, stem_of
from psikv_bench.fidelity.likelihood import Tick
from psikv_bench.fidelity.plan import Plan
from psikv_bench.fidelity.retrieval import Outcome
from psikv_bench.fidelity.subject import Subject

TASK = "chat"
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
class Script:
    """A chat in tokens: what all policies read with the full cache, the turns between which the governor
    acts, and the questions."""

    opening: list[int]
    turns: list[list[int]]
    asked: list[tuple[Planted, list[int]]]


def measure(subject: Subject, plan: Plan, tick: Tick, *, number: int) -> list[Outcome]:
    """One chat with the full cache, and under every policy and share."""
    what = f"chat {number + 1} of {plan.chats}"
    tick(f"{what}: facts and chatter")
    script = _script(subject, plan, number)
    subject.cut(0)
    subject.read(script.opening)
    mark = subject.mark()
    for turn in script.turns:
        subject.read(turn)
    found = _answers(subject, script, FULL, 0.0)
    for share, policy in product(plan.shares, plan.compared):
        subject.back_to(mark)
        tick(f"{what}: {policy.name} gives up {share:.0%}")
        found += _under_pressure(subject, script, policy, share)
    return found


def _script(subject: Subject, plan: Plan, number: int) -> Script:
    """Raises BadInputError for a chat that does not fit, or a template that can't be used."""
    render = renderer(subject.llm.metadata.get("tokenizer.chat_template"))
    spoken = chat(plan.seed + number, plan.texts[number % len(plan.texts)], plan.chat_tokens)
    messages = list(spoken.opening)
    said = [render(messages)]
    for turn in spoken.chatter:
        if len(said) > _TURNS_UNDER_PRESSURE and len(subject.tokens(said[-1])) >= plan.chat_tokens:
            break
        messages += turn
        said.append(render(messages))
    else:
        raise PsiKvError(f"the text is too short for a chat of {plan.chat_tokens} tokens")
    under_pressure = said[-_TURNS_UNDER_PRESSURE - 1 :]
    script = Script(
        opening=subject.tokens(under_pressure[0]),
        turns=[subject.tokens(added(before, after)) for before, after in pairwise(under_pressure)],
        asked=[(fact, subject.tokens(stem_of(render, messages, fact))) for fact in spoken.planted],
    )
    length = len(script.opening) + sum(map(len, script.turns)) + max(len(stem) for _, stem in script.asked)
    if length > subject.n_ctx:
        raise BadInputError(
            f"the chat takes {length} tokens of this model: measure longer contexts (--ctx), or leave it out "
            "(--only)"
        )
    return script


def _under_pressure(subject: Subject, script: Script, policy: Policy, share: float) -> list[Outcome]:
    mark = subject.mark()
    with subject.recalling(policy), subject.governed(policy, ScriptedPressure()) as governor:
        for number, turn in enumerate(script.turns, 1):
            _trim(subject, governor, share * number / len(script.turns))
            subject.read(turn)
        found = _answers(subject, script, policy.name, share)
        subject.back_to(mark)
        subject.unmask()  # before the governor is closed
    return found


def _trim(subject: Subject, governor: Governor, goal: float) -> None:
    for _ in range(_READINGS):
        if subject.missing_share() >= goal:
            return
        governor.step()
    raise PsiKvError(f"the governor gave up {subject.missing_share():.0%} and not {goal:.0%}")


def _answers(subject: Subject, script: Script, policy: str, share: float) -> list[Outcome]:
    """Right: the first token of the right answer is more probable than those of the other choices."""
    found = []
    for fact, stem in script.asked:
        mark = subject.mark()
        logits = subject.asked(stem, ())[0]
        subject.back_to(mark)
        said = max(fact.choices, key=lambda choice: logits[subject.tokens(f" {choice}")[0]])
        found.append(Outcome(TASK, "later", policy, share, said == fact.answer))
    return found
