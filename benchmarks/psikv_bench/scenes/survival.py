"""Plain llama.cpp and the governed one in every surrounding: governed is never worse."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from psi_kv_governor.checks import Check
from psi_kv_governor.errors import BadInputError
from psikv_bench.figures import Asked, Figure, figure
from psikv_bench.journal import remaining
from psikv_bench.messages import Variant
from psikv_bench.options import Options
from psikv_bench.record import Recorder, Report, Table
from psikv_bench.scene import Scene
from psikv_bench.survival.lives import Run, live, prepared, workshop
from psikv_bench.survival.surroundings import QUICK, SURROUNDINGS, why_not

VARIANTS: tuple[Variant, ...] = ("fixed", "psi")


class SurvivalOptions(Options, frozen=True, kw_only=True):
    """What is asked for."""

    only: Annotated[tuple[str, ...], Meta(description="Which surroundings.")] = tuple(SURROUNDINGS)
    ctx: Annotated[int, Meta(ge=256, description="Tokens in the context.")] = 1200
    tokens: Annotated[int, Meta(ge=1, description="Decoded while the others are there.")] = 32
    repeats: Annotated[int, Meta(ge=1, description="Of each, plain and governed.")] = 1

    def check(self) -> None:
        for name in self.only:
            if name not in SURROUNDINGS:
                raise BadInputError(f"--only {name} is not usable: known are {', '.join(SURROUNDINGS)}")


class Pair(msgspec.Struct, frozen=True, kw_only=True):
    """Both in one surrounding, one after the other."""

    surrounding: str
    about: str
    plain: Run
    governed: Run

    @property
    def worse(self) -> bool:
        """Plain lives and governed does not."""
        return self.plain.outcome == "lives" != self.governed.outcome

    @property
    def speed(self) -> float:
        """Tokens a second over plain; 0 where one of them decoded nothing."""
        plain, governed = self.plain.tokens_per_s, self.governed.tokens_per_s
        return governed / plain if plain else 0.0

    @property
    def answers(self) -> str:
        """How the governed one's answers compare with the plain one's."""
        if not (self.plain.tokens and self.governed.tokens):
            return "-"
        if self.governed.again != self.plain.again:
            return "differ"
        if self.governed.tokens == self.plain.tokens:
            return "equal"
        return f"told: {self.governed.masked} masked" if self.governed.masked else "differ"


def run(recorder: Recorder[SurvivalOptions]) -> Report:
    """Each surrounding in turn, plain and then governed. Ctrl-C keeps what is finished."""
    asked = recorder.options
    journal = recorder.journal(Pair, msgspec.structs.replace(asked, model="", repeats=1))
    pairs: list[Pair] = journal.parts
    ahead = remaining(asked.only * asked.repeats, [pair.surrounding for pair in pairs])
    with workshop() as folder:
        recorder.say("the context is decoded once", new=True)
        base, need = prepared(asked.model, asked.ctx, asked.tokens, folder)

        def one(name: str) -> Pair:
            recorder.say(f"{len(pairs) + 1} of {asked.repeats * len(asked.only)}: {name}", new=True)
            plain, governed = (live(name, variant, base, need, folder) for variant in VARIANTS)
            about = " ".join((SURROUNDINGS[name].__doc__ or "").split())
            return Pair(surrounding=name, about=about, plain=plain, governed=governed)

        journal.play(ahead, one)
    report = recorder.report(
        list(_figures(pairs)),
        [1],
        interrupted=journal.interrupted,
        tables=[table(pairs)],
        notes=[
            "tokens/s are of one run each, whatever else the machine did meanwhile: they are no record",
            "answers: equal token by token; `told`: some were decoded while cells were masked, as the result "
            "says (`psi_kv`), and they were equal again once those were back",
        ],
        rows=pairs,
    )
    return recorder.save(report)


def _figures(pairs: Sequence[Pair]) -> Iterator[Figure]:
    here = [pair for pair in pairs if pair.plain.outcome != "not here"]
    none = Asked("<=", 0, "max")
    yield figure("plain lives and governed does not", "times", [sum(pair.worse for pair in here)], none)
    differ = sum(pair.answers == "differ" for pair in here)
    yield figure("answers that differ, and are not told to", "times", [differ], none)
    saved = sum(pair.governed.outcome == "lives" != pair.plain.outcome for pair in here)
    yield figure("governed lives and plain does not", "times", [saved])
    for pair in here:
        if pair.speed:
            yield figure("tokens/s over plain", "x", [pair.speed], case=pair.surrounding)


def by_surrounding(pairs: Iterable[Pair]) -> dict[str, list[Pair]]:
    """Those of each surrounding, in order, however they were played."""
    found: dict[str, list[Pair]] = {}
    for pair in pairs:
        found.setdefault(pair.surrounding, []).append(pair)
    return found


_COLUMNS: dict[str, Callable[[list[Pair]], object]] = {
    "surrounding": lambda times: times[-1].surrounding,
    "what it is": lambda times: times[-1].about,
    "plain": lambda times: _outcome([one.plain.outcome for one in times]),
    "governed": lambda times: _outcome([one.governed.outcome for one in times]),
    "answers": lambda times: times[-1].answers,
    "tokens/s over plain": lambda times: f"{times[-1].speed:.2f}" if times[-1].speed else "-",
    "MB returned": lambda times: f"{times[-1].governed.returned_bytes / 1e6:.0f}",
    "ungoverned, or how it ended": lambda times: _why(times[-1].governed),
}


def table(pairs: Sequence[Pair]) -> Table:
    """Who lives in what. Of a surrounding that was played more often, the numbers are of the last time."""
    return Table.of("who lives", _COLUMNS, by_surrounding(pairs).values())


def _outcome(outcomes: Sequence[str]) -> str:
    """In a word; of several that differ, how many live."""
    alive = f"{outcomes.count('lives')} of {len(outcomes)} live"
    return outcomes[0] if len(set(outcomes)) == 1 else alive


def _why(run: Run) -> str:
    """A reason without the paths of this machine."""
    return (run.ungoverned or (run.why if run.outcome != "lives" else "")).partition(" (")[0][:80]


def _checks(options: SurvivalOptions, folder: Path | None) -> Iterator[Check]:
    del folder
    why = why_not(options.only)
    yield Check("machine", "fail" if why else "ok", "can't be run" if why else "root, with cgroups", why)


SCENE = Scene(
    about="""Plain and governed in each hostile surrounding: in none plain lives and governed does not.

    Real cgroups, mounts, users and seccomp filters, each made for one run.
    """,
    options=SurvivalOptions(),
    quick=SurvivalOptions(only=QUICK, ctx=900, tokens=24),
    run=run,
    examples=("psi-kv bench survival --quick", "psi-kv bench survival --only hardened,slow-disk"),
    checks=_checks,
)
