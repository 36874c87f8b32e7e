"""Plain llama.cpp and the governed one in every surrounding: governed is never worse."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from psi_kv_governor.errors import BadInputError, PsiKvError
from psi_kv_governor.preflight import Check
from psi_kv_governor.sandbox.messages import Variant
from psikv_bench.figures import Asked, Figure, figure
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
    interrupted = False
    with workshop() as folder:
        recorder.say("the context is decoded once", new=True)
        base, need = prepared(asked.model, asked.ctx, asked.tokens, folder)
        try:
            done = Counter(pair.surrounding for pair in pairs)
            for number, name in enumerate(name for _ in range(asked.repeats) for name in asked.only):
                if done[name]:
                    done[name] -= 1
                    continue
                recorder.say(f"{number + 1} of {asked.repeats * len(asked.only)}: {name}", new=True)
                plain, governed = (live(name, variant, base, need, folder) for variant in VARIANTS)
                about = " ".join((SURROUNDINGS[name].__doc__ or "").split())
                journal.add(Pair(surrounding=name, about=about, plain=plain, governed=governed))
        except KeyboardInterrupt:
            interrupted = True
    if not pairs:
        raise PsiKvError("interrupted before the first was finished: there is nothing to report")
    report = recorder.report(
        list(_figures(pairs)),
        [1],
        interrupted=interrupted,
        tables=[table(pairs)],
        notes=[
            "tokens/s are of one run each, whatever else the machine did meanwhile: they are no record",
            "answers: equal token by token; `told`: some were decoded while cells were masked, as the result "
            "says (`psi_kv`), and they were equal again once those were back",
        ],
        rows=pairs,
    )
    return recorder.save(report)


# -- telling -----------------------------------------------------------------------------------------------


def _figures(pairs: Sequence[Pair]) -> Iterator[Figure]:
    here = [pair for pair in pairs if pair.plain.outcome != "not here"]
    none = Asked("<=", 0, "max")
    yield figure("plain lives and governed does not", "times", [sum(pair.worse for pair in here)], none)
    differ = sum(pair.answers == "differ" for pair in here)
    yield figure("answers that differ, and are not told to", "times", [differ], none)
    saved = sum(pair.governed.outcome == "lives" != pair.plain.outcome for pair in here)
    yield figure("governed lives and plain does not", "times", [saved])
    for pair in here:
        if pair.plain.tokens_per_s and pair.governed.tokens_per_s:
            ratio = pair.governed.tokens_per_s / pair.plain.tokens_per_s
            yield figure("tokens/s over plain", "x", [ratio], case=pair.surrounding)


def by_surrounding(pairs: Iterable[Pair]) -> dict[str, list[Pair]]:
    """Those of each surrounding, in order, however they were played."""
    found: dict[str, list[Pair]] = {}
    for pair in pairs:
        found.setdefault(pair.surrounding, []).append(pair)
    return found


def table(pairs: Sequence[Pair]) -> Table:
    """Who lives in what. Of a surrounding that was played more often, the numbers are of the last time."""
    rows = []
    for times in by_surrounding(pairs).values():
        pair = times[-1]
        plain, governed = pair.plain, pair.governed
        ratio = f"{governed.tokens_per_s / plain.tokens_per_s:.2f}" if plain.tokens_per_s else "-"
        rows.append(
            [
                pair.surrounding,
                pair.about,
                _outcome([one.plain.outcome for one in times]),
                _outcome([one.governed.outcome for one in times]),
                pair.answers,
                ratio if governed.tokens_per_s else "-",
                f"{governed.returned_bytes / 1e6:.0f}",
                _short(governed.ungoverned or (governed.why if governed.outcome != "lives" else "")),
            ]
        )
    return Table(
        title="who lives",
        columns=[
            "surrounding", "what it is", "plain", "governed", "answers", "tokens/s over plain",
            "MB returned", "ungoverned, or how it ended",
        ],
        rows=rows,
    )  # fmt: skip


def _outcome(outcomes: Sequence[str]) -> str:
    """In a word; of several that differ, how many live."""
    alive = f"{outcomes.count('lives')} of {len(outcomes)} live"
    return outcomes[0] if len(set(outcomes)) == 1 else alive


def _short(why: str) -> str:
    """A reason without the paths of this machine."""
    return why.partition(" (")[0][:80]


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
