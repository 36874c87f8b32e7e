"""Unknown names in messages: which of the known names was probably meant."""

from __future__ import annotations

from collections.abc import Iterable


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that is most like `name`; None when none is like it."""
    import difflib  # 0.2 MB, for messages alone

    return next(iter(difflib.get_close_matches(name.lower(), list(known), n=1)), None)


def unknown(what: str, name: str, known: Iterable[str]) -> str:
    """One clause that says that `name` is unknown, which name is nearest, and all that are known."""
    names = list(known)
    near = nearest(name, names)
    hint = f"did you mean {near}? " if near else ""
    return f"unknown {what} {name!r}: {hint}known are {', '.join(names)}"
