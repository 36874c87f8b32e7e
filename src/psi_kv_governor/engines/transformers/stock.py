"""The rung without a new cache: the end (or all) of a DynamicCache that the caller holds, parked."""

from __future__ import annotations

import ctypes
from typing import Any, NamedTuple

import torch
from transformers.cache_utils import Cache, DynamicLayer

from psi_kv_governor.engines.transformers.versions import check_versions
from psi_kv_governor.errors import BadInputError, EngineError
from psi_kv_governor.kernel.memory import PAGE_BYTES
from psi_kv_governor.residence import Mapping, Place


class _Slot(NamedTuple):
    """Where the states of one layer are in the mapping: K, then V."""

    layer: int
    start: int
    stop: int
    shapes: tuple[tuple[int, ...], tuple[int, ...]]
    dtype: torch.dtype


class ParkedEnd:
    """The last positions of a stock cache, parked, by nothing but its public `crop` and `update`."""

    def __init__(self, cache: Cache, cells: int, place: Place) -> None:
        """Park the last `cells` positions of every layer with full attention in host memory.

        While they are parked nothing may be decoded with the cache. Raises BadInputError for a cache of
        another kind, and EngineError, with the cache as it was, where the bytes can't be parked.
        """
        check_versions()
        layers = [(i, layer) for i, layer in enumerate(cache.layers) if _can_go(layer)]
        if not layers or not 0 < cells <= cache.get_seq_length():
            raise BadInputError(
                f"this cache has no {cells} positions in stock layers with full attention in host memory"
            )
        self.cells = cells
        self.bytes_parked = 0
        self._cache = cache
        self._lengths: dict[int, int] = {}
        self._slots: list[_Slot] = []
        start = 0
        for index, layer in layers:
            ends = [states[..., -cells:, :] for states in (layer.keys, layer.values)]
            n_bytes = sum(end.numel() * end.element_size() for end in ends)
            stop = start + -(-n_bytes // PAGE_BYTES) * PAGE_BYTES
            shapes = tuple(ends[0].shape), tuple(ends[1].shape)
            self._slots.append(_Slot(index, start, stop, shapes, layer.keys.dtype))
            start = stop
        self._mapping = Mapping(start, place=place)
        for slot in self._slots:
            if problem := self._park(slot):
                self.put_back()
                raise EngineError(f"the cache stays as it was: {problem}")
        _trim_heap()

    def _park(self, slot: _Slot) -> str:
        layer = self._cache.layers[slot.layer]
        for into, states in zip(self._states(slot), (layer.keys, layer.values), strict=True):
            into.copy_(states[..., -self.cells :, :])
        done = self._mapping.park([(slot.start, slot.stop)])
        if done.problem:
            return done.problem
        self.bytes_parked += done.bytes_returned
        left = layer.keys.shape[-2] - self.cells
        layer.crop(-self.cells)
        # A cropped tensor is a view of the whole: adding nothing makes it one of its own.
        nothing = layer.keys[..., :0, :], layer.values[..., :0, :]
        layer.update(*nothing)
        self._lengths[slot.layer] = left
        return ""

    def _states(self, slot: _Slot) -> list[torch.Tensor]:
        """K and V of a slot, as views of the mapping."""
        views, offset = [], slot.start
        for shape in slot.shapes:
            count = int(torch.Size(shape).numel())
            flat: Any = torch.frombuffer(self._mapping.buffer, dtype=slot.dtype, count=count, offset=offset)
            views.append(flat.view(shape))
            offset += count * slot.dtype.itemsize
        return views

    def put_back(self) -> None:
        """Give the cache its positions again, bit for bit: one update a layer. Raises BadInputError, and
        changes nothing, where it was used meanwhile."""
        layers = self._cache.layers
        if any(layers[index].keys.shape[-2] != length for index, length in self._lengths.items()):
            raise BadInputError("this cache was used while its end was parked: reset() it and prefill again")
        for slot in self._slots:
            if slot.layer in self._lengths:
                layers[slot.layer].update(*self._states(slot))
                del self._lengths[slot.layer]
                self._mapping.release([(slot.start, slot.stop)])
        self._mapping.close()
        self._slots.clear()


def _can_go(layer: Any) -> bool:
    keys = getattr(layer, "keys", None)
    return type(layer) is DynamicLayer and keys is not None and keys.device.type == "cpu"


def _trim_heap() -> None:
    """Have malloc return what is free: torch's large tensors go by themselves, small ones do not."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
