"""The KV cache's memory: what vLLM allocates as zeros is answered with a mapping of ours."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from collections.abc import Mapping as MappingOf
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from psi_kv_governor.engines.vllm.layout import Layout, LayoutError, View, layout_of
from psi_kv_governor.residence import Backing, Mapping, Place

LEAST_BYTES = 1 << 20
"""Smaller buffers are bookkeeping, and no cache."""


class Memory:
    """The mappings that a worker's KV cache lies in. They live as long as the tensors do."""

    def __init__(self, backing: Backing, place: Place | None) -> None:
        self.backing: Backing = backing
        self.place = place
        self.mappings: list[Mapping] = []

    @contextlib.contextmanager
    def answering(self) -> Iterator[None]:
        """While it is open, large zeroed host tensors are ours: pages come into being when first written."""
        with _Zeros(self):
            yield

    def make(self, n_bytes: int) -> Mapping:
        """Memory that reads as zeros. Raises OSError where there is no address space."""
        mapping = Mapping(n_bytes, backing=self.backing, place=self.place)
        self.mappings.append(mapping)
        return mapping

    def layout(self, caches: MappingOf[str, Any], n_blocks: int) -> Layout:
        """Where blocks are. Raises LayoutError."""
        return layout_of([self._view(tensor) for tensor in _tensors(caches)], n_blocks)

    def _view(self, tensor: torch.Tensor) -> View:
        address, item = tensor.data_ptr(), tensor.element_size()
        for number, mapping in enumerate(self.mappings):
            if mapping.address <= address < mapping.address + mapping.n_bytes:
                strides = tuple(stride * item for stride in tensor.stride())
                return View(number, address - mapping.address, tuple(tensor.shape), strides, item)
        raise LayoutError("vLLM allocated the cache in a way that is not known here")


def _tensors(caches: MappingOf[str, Any]) -> Iterator[torch.Tensor]:
    seen = set()
    for name, cache in caches.items():
        if not isinstance(cache, torch.Tensor):
            raise LayoutError(f"layer {name} keeps a state, which has no blocks")
        key = (cache.data_ptr(), tuple(cache.shape), cache.stride())
        if key not in seen:
            seen.add(key)
            yield cache


class _Zeros(TorchFunctionMode):
    def __init__(self, memory: Memory) -> None:
        super().__init__()
        self._memory = memory

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.zeros and (answer := self._answer(args, kwargs)) is not None:
            return answer
        return func(*args, **kwargs)

    def _answer(self, args: Any, kwargs: dict[str, Any]) -> torch.Tensor | None:
        """None where it is no host buffer of a size; then torch's own answer stands."""
        device = torch.device(kwargs.get("device") or "cpu")
        if device.type != "cpu" or set(kwargs) - {"dtype", "device", "size", "pin_memory", "requires_grad"}:
            return None
        if kwargs.get("pin_memory") or kwargs.get("requires_grad"):
            return None
        shape = kwargs.get("size", args)
        while len(shape) == 1 and not isinstance(shape[0], int):
            shape = shape[0]
        dtype = kwargs.get("dtype") or torch.get_default_dtype()
        count = 1
        for size in shape:
            count *= int(size)
        n_bytes = count * dtype.itemsize
        if n_bytes < LEAST_BYTES:
            return None
        mapping = self._memory.make(n_bytes)
        flat = torch.frombuffer(mapping.buffer, dtype=torch.uint8, count=n_bytes)
        return flat.view(dtype).reshape(tuple(int(size) for size in shape))
