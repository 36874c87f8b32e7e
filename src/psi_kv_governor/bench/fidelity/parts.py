"""The parts of the benchmark, cut into pieces."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from psi_kv_governor.bench.fidelity import chats, likelihood, retrieval, speed, spike
from psi_kv_governor.bench.fidelity.likelihood import Tick
from psi_kv_governor.bench.fidelity.pieces import Piece
from psi_kv_governor.bench.fidelity.plan import Plan
from psi_kv_governor.bench.fidelity.results import Likelihood, Speed, Spike
from psi_kv_governor.bench.fidelity.subject import Subject


@dataclass
class Found:
    """What has been measured so far."""

    texts: list[likelihood.Measured] = field(default_factory=list)
    steps: list[likelihood.Steps] = field(default_factory=list)
    noise: list[Likelihood] = field(default_factory=list)
    spikes: list[Spike] = field(default_factory=list)
    screened: list[retrieval.Outcome] = field(default_factory=list)
    answered: list[retrieval.Outcome] = field(default_factory=list)
    talks: list[chats.Talk] = field(default_factory=list)
    speed: list[Speed] = field(default_factory=list)

    @property
    def runs(self) -> list[likelihood.Run]:
        """Of all texts."""
        return [run for measured in self.texts for run in measured.runs]


def unrounded(plan: Plan, found: Found) -> Iterator[Piece[Any]]:
    """What is measured without the arithmetic's noise, where the weights are taken to f32."""
    for name in plan.texts:
        for ctx in plan.ctx:
            yield Piece(
                part="texts",
                name=f"{name}-{ctx}",
                steps=likelihood.steps(plan),
                kind=likelihood.Measured,
                measure=_with(likelihood.measure, plan, name, ctx),
                take=found.texts.append,
            )
    for name in plan.texts[: plan.gradual_texts]:
        yield Piece(
            part="steps",
            name=name,
            steps=likelihood.gradual_steps(plan),
            kind=list[likelihood.Steps],
            measure=_with(likelihood.measure_gradual, plan, name),
            take=found.steps.extend,
        )


def native(plan: Plan, found: Found, default: str) -> Iterator[Piece[Any]]:
    """What is measured with the model as users have it; `default` is the policy whose speed is."""
    yield Piece("noise", "one", 1, Likelihood, _with(likelihood.control, plan), found.noise.append)
    yield Piece(
        "spike", "one", spike.steps(plan), list[Spike], _with(spike.measure, plan), found.spikes.extend
    )
    yield from _facts(plan, found)
    for i in range(plan.chats):
        yield Piece(
            part="chats",
            name=str(i),
            steps=chats.steps(plan),
            kind=list[chats.Talk],
            measure=_with(chats.measure, plan, i),
            take=found.talks.extend,
        )
    yield Piece("speed", default, speed.steps(plan), Speed, _with(speed.measure, plan), found.speed.append)


def _facts(plan: Plan, found: Found) -> Iterator[Piece[Any]]:
    outcomes = list[retrieval.Outcome]
    yield Piece(
        part="facts",
        name="full",
        steps=retrieval.screen_steps(plan),
        kind=outcomes,
        measure=_with(retrieval.screen, plan),
        take=found.screened.extend,
    )
    # Only now: whoever takes the pieces one by one has taken the full cache's answers by here.
    able = frozenset(task.name for task in retrieval.tasks(found.screened) if task.able)
    for i in range(plan.haystacks):
        yield Piece(
            part="facts",
            name=str(i),
            steps=retrieval.steps(plan, i),
            kind=outcomes,
            measure=_with(retrieval.measure, plan, i, able),
            take=found.answered.extend,
        )


def _with(measure: Callable[..., Any], plan: Plan, *what: object) -> Callable[[Subject, Tick], Any]:
    return lambda subject, tick: measure(subject, plan, *what, tick)
