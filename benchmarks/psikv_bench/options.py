"""What a scene can be asked for: fields with their bounds and a line of help, which become the command line.

A field `hold_s` is the option `--hold-s`. Bounds are msgspec's metadata, so there is one place for each.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta

from psi_kv_governor.errors import BadInputError
from psi_kv_governor.model import demo_model_path
from psikv_bench.messages import VARIANTS, Variant

_S = TypeVar("_S", bound="Options")


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """What every scene is asked for."""

    model: Annotated[str, Meta(description="GGUF file [default: the demo model].")] = ""
    threads: Annotated[int, Meta(ge=1, description="Threads that decode.")] | None = None

    def check(self) -> None:
        """Raises BadInputError for what can't be measured together."""


def chosen(base: _S, given: Mapping[str, Any]) -> _S:
    """`base` with what was given in its place; None is not given.

    Raises BadInputError for what can't be used.
    """
    values = {name: value for name, value in given.items() if value is not None}
    for name, value in values.items():
        for one in value if isinstance(value, Sequence) and not isinstance(value, str) else [value]:
            if isinstance(one, float) and not math.isfinite(one):
                raise BadInputError(f"{flag(name)} {one} is not usable: give a number")
    try:
        found = msgspec.convert({**msgspec.structs.asdict(base), **values}, type(base))
    except msgspec.ValidationError as error:
        raise BadInputError(_words(error, values)) from None
    found.check()
    return found


def _words(error: msgspec.ValidationError, given: Mapping[str, Any]) -> str:
    """What is wrong, by the option's name: "--runs 0 is not usable: expected int >= 1"."""
    what, _, place = str(error).partition(" - at `$.")
    name = place.rstrip("`").partition("[")[0]
    return f"{flag(name)} {given.get(name, '')} is not usable: {what[0].lower()}{what[1:]}"


def with_model(options: _S) -> _S:
    """`options` with the demo model where none was given. Raises PsiKvError where it is not here."""
    return options if options.model else msgspec.structs.replace(options, model=str(demo_model_path()))


def flag(name: str) -> str:
    """A field's name as it is given on the command line."""
    return "--" + name.replace("_", "-")


def each_once(name: str, values: Sequence[object]) -> None:
    """Raises BadInputError for an empty list, or one that says something twice."""
    if not values or len(set(values)) != len(values):
        raise BadInputError(f"{flag(name)} is not usable: give each once, at least one")


def in_order(variants: Sequence[Variant]) -> list[Variant]:
    """`variants` in the order in which they are defined."""
    return sorted(variants, key=VARIANTS.index)
