"""Where the bytes of a block are in the memory that a KV cache was born in: plain arithmetic on strides."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from psi_kv_governor.residence.parts import Part


class View(NamedTuple):
    """One tensor of a KV cache, as its attention sees it. Strides are bytes."""

    mapping: int
    """Number of the mapping that it lies in."""
    offset: int
    """Bytes from the beginning of that mapping."""
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    item_bytes: int


class Run(NamedTuple):
    """One contiguous piece of every block: block `b` has `n_bytes` at `start + b * step`."""

    mapping: int
    start: int
    step: int
    n_bytes: int


class LayoutError(ValueError):
    """Blocks do not lie so that they can be parked one by one; the text says why, in one clause."""


class Layout:
    """The pieces of each block, over all layers."""

    def __init__(self, runs: Iterable[Run], n_blocks: int) -> None:
        self.runs = tuple(sorted(set(runs)))
        self.n_blocks = n_blocks

    @property
    def block_bytes(self) -> int:
        """Bytes of one block in all layers."""
        return sum(run.n_bytes for run in self.runs)

    def parts(self, blocks: Iterable[int]) -> dict[int, list[Part]]:
        """By mapping, the bytes of `blocks`: sorted, and joined where they touch, so that a page that two of
        them share can go."""
        found: dict[int, list[Part]] = {}
        for run in self.runs:
            parts = found.setdefault(run.mapping, [])
            parts += [(run.start + run.step * b, run.start + run.step * b + run.n_bytes) for b in blocks]
        return {mapping: _joined(parts) for mapping, parts in found.items()}


def layout_of(views: Sequence[View], n_blocks: int) -> Layout:
    """The layout of a cache of `n_blocks`. Raises LayoutError."""
    if not views:
        raise LayoutError("the cache has no tensor that lies in memory of ours")
    runs = [run for view in views for run in _runs(view, n_blocks)]
    for mapping in {run.mapping for run in runs}:
        if len({run.step for run in runs if run.mapping == mapping}) > 1:
            # Groups of layers overlay each other: block 3 of one may be bytes of block 2 of another.
            raise LayoutError("layers lay out their blocks at different distances in the same memory")
    return Layout(runs, n_blocks)


def _runs(view: View, n_blocks: int) -> list[Run]:
    dims = [(size, stride) for size, stride in zip(view.shape, view.strides, strict=True) if size > 1]
    dims.sort(key=lambda dim: -dim[1])
    place = next((i for i, (size, _) in enumerate(dims) if size % n_blocks == 0), None)
    if place is None or n_blocks < 2:
        raise LayoutError(f"a tensor of shape {list(view.shape)} has no dimension of {n_blocks} blocks")
    size, stride = dims[place]
    step = stride * (size // n_blocks)  # a block of the manager may be several of the kernel
    inner = [(size // n_blocks, stride), *dims[place + 1 :]]
    n_bytes = sum((n - 1) * s for n, s in inner) + view.item_bytes
    if n_bytes != math.prod(n for n, _ in inner) * view.item_bytes or n_bytes > step:
        raise LayoutError("the rows of a block do not lie together")
    outer = dims[:place]
    return [
        Run(
            view.mapping,
            view.offset + sum(i * s for i, (_, s) in zip(index, outer, strict=True)),
            step,
            n_bytes,
        )
        for index in itertools.product(*(range(n) for n, _ in outer))
    ]


def _joined(parts: list[Part]) -> list[Part]:
    joined: list[Part] = []
    for start, stop in sorted(parts):
        if joined and joined[-1][1] >= start:
            joined[-1] = (joined[-1][0], max(joined[-1][1], stop))
        else:
            joined.append((start, stop))
    return joined
