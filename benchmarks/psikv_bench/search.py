"""The largest number that passes a costly test: doubling, then bisecting."""

from __future__ import annotations

from collections.abc import Callable


def largest(passes: Callable[[int], bool], start: int, *, step: int, most: int, resolution: float) -> int:
    """The largest multiple of `step` up to `most` that passes, to within a factor of `resolution`; or 0.

    Begins at `start`, doubles while it passes (or halves while it doesn't), then bisects until the smallest
    that failed is no more than `resolution` times the largest that passed, or one step above it. Takes for
    granted that what is longer than a failure fails; no number is tested twice.
    """
    best, failed = 0, None
    size: int | None = _rounded(min(max(start, step), most), step)
    while size is not None:
        if passes(size):
            best = size
        else:
            failed = size
        size = _next(best, failed, step, most, resolution)
    return best


def _next(best: int, failed: int | None, step: int, most: int, resolution: float) -> int | None:
    """What to try now; None when it is known well enough."""
    if failed is None:
        larger = _rounded(min(2 * best, most), step)
        return larger if larger > best else None
    if failed - best <= step or (best and failed <= resolution * best):
        return None
    return _rounded((best + failed) // 2, step)


def _rounded(size: int, step: int) -> int:
    return max(step, size // step * step)
