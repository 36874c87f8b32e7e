"""What the caches may hold while the machine is under pressure: set for a process, or for one governor."""

from __future__ import annotations

from psi_kv_governor.errors import BadInputError

_of_process: float | None = None


def psi_set_cache_limit(share: float | None) -> None:
    """Limit what governed caches hold under pressure, from now on and in all of this process.

    While the machine is under pressure, each holds at most this `share` of its cells.

    Args:
        share: From 0 to 1; None lifts the limit.

    Raises:
        BadInputError: It is no such share.
    """
    global _of_process  # noqa: PLW0603  # the one-line form is process wide by definition
    _of_process = _checked(share)


def _checked(share: float | None) -> float | None:
    if share is not None and not 0.0 <= share <= 1.0:
        raise BadInputError(f"a cache limit of {share} is not usable: give a share from 0 to 1, or None")
    return share


class Limit:
    """The limit of one governor's caches; the process' where it has none of its own."""

    def __init__(self) -> None:
        self._share: float | None = None
        self.n_bytes: int | None = None
        """Of all caches together, where it was given so."""

    def set(self, share: float | None, n_bytes: int | None) -> None:
        """A share, or bytes; neither lifts it. Raises BadInputError."""
        if share is not None and n_bytes is not None:
            raise BadInputError("a cache limit is a share or a number of bytes: give one of them")
        if n_bytes is not None and n_bytes < 0:
            raise BadInputError(f"a cache limit of {n_bytes} bytes is not usable: give 0 or more")
        self._share, self.n_bytes = _checked(share), n_bytes

    @property
    def share(self) -> float | None:
        """What was given as a share."""
        if self.n_bytes is not None:
            return None
        return self._share if self._share is not None else _of_process

    def share_of(self, total_bytes: int) -> float | None:
        """The limit as the law takes it: a share of `total_bytes`, all that the caches hold."""
        if self.n_bytes is None:
            return self.share
        return min(1.0, self.n_bytes / total_bytes) if total_bytes else None
