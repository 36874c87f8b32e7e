"""Every exception of the package. The message is one line and says what to do about it."""

from __future__ import annotations

__all__ = ["BadInputError", "EngineError", "PsiKvError", "SourceLostError"]


class PsiKvError(Exception):
    """Base of all errors that the package raises on purpose."""

    exit_status = 1


class BadInputError(PsiKvError, ValueError):
    """An argument, option, file or setting that cannot be used as given."""

    exit_status = 2


class SourceLostError(PsiKvError):
    """A pressure source stopped answering while it was in use."""


class EngineError(PsiKvError):
    """The engine could not do a step that it had announced it can."""
