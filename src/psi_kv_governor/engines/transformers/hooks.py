"""What happens around each forward pass of a model that has governed caches."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from psi_kv_governor.cache import Range
from psi_kv_governor.engines.transformers.exchange import Demand
from psi_kv_governor.engines.transformers.places import Places
from psi_kv_governor.engines.transformers.versions import CACHE_NAMES


class Follower(Protocol):
    """Recall, which has rows come back. All of it is called while nothing else can move rows."""

    demand: Demand
    why_not: str

    @property
    def summary_bytes(self) -> int: ...

    def summarise(self, gone: Sequence[Range], runs: Sequence[Range]) -> None: ...

    def reorder(self, order: torch.Tensor) -> None: ...

    def crop(self, length: int) -> None: ...

    def after(self) -> bool: ...

    def once_more(self, forward: Callable[[], Any]) -> Any: ...


class Followed(Protocol):
    """What is asked of a cache here."""

    affected: int

    @property
    def places(self) -> Places: ...

    def begin_forward(self) -> None: ...

    def end_forward(self) -> None: ...

    def once_more(self, forward: Callable[[], Any]) -> Any: ...


_given: weakref.WeakKeyDictionary[Followed, tuple[Any, Any]] = weakref.WeakKeyDictionary()
"""The arguments of the passes that run."""
_hooked: weakref.WeakKeyDictionary[Any, weakref.WeakSet[Followed]] = weakref.WeakKeyDictionary()
"""The caches of each module that has our hooks."""


def hook(model: Any, cache: Followed) -> None:
    """Tell `cache` of the forward passes of `model`. The hooks stay, and mind nothing but caches of ours."""
    module = model.base_model
    if module not in _hooked:
        _hooked[module] = weakref.WeakSet()
        module.register_forward_pre_hook(_before, with_kwargs=True)
        module.register_forward_hook(_after, with_kwargs=True, always_call=True)
    _hooked[module].add(cache)


def module_of(cache: Followed) -> Any:
    """The module whose forward passes `cache` is told of."""
    return next(module for module, caches in _hooked.items() if cache in caches)


def _own(module: Any, args: Any, kwargs: Any) -> Followed | None:
    """The cache of this pass, where it is one of this model's."""
    caches = _hooked[module]
    given = (kwargs[name] for name in CACHE_NAMES if name in kwargs)
    return next((it for it in (*given, *args) if _is_cache(it) and it in caches), None)


def _is_cache(given: Any) -> bool:
    return hasattr(given, "begin_forward")


def _before(module: Any, args: Any, kwargs: Any) -> Any:
    cache = _own(module, args, kwargs)
    if cache is None:
        return None
    cache.begin_forward()
    _given[cache] = args, kwargs
    holes = cache.places.next_position - cache.places.live_cells
    if not holes:
        return None
    n_tokens = _query_tokens(args, kwargs)
    cache.affected += n_tokens
    mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
    if not isinstance(mask, torch.Tensor) or mask.shape[-1] != cache.places.next_position + n_tokens:
        return None
    mask = with_packed_columns(mask, cache, n_tokens)
    if "attention_mask" in kwargs:
        return args, {**kwargs, "attention_mask": mask}
    return (args[0], mask, *args[2:]), kwargs


def with_packed_columns(mask: torch.Tensor, cache: Followed, n_tokens: int) -> torch.Tensor:
    """`mask` with the columns of the live positions where their rows stand.

    A mask of tokens [batch, positions] keeps its length, as the mask is later read from the number of holes
    on; a ready mask [batch, heads, queries, positions] loses the columns of the holes.
    """
    live = torch.from_numpy(cache.places.live_positions()).to(mask.device)
    first = cache.places.next_position
    columns = torch.cat([live, torch.arange(first, first + n_tokens, device=mask.device)])
    packed = mask.index_select(-1, columns)
    if mask.ndim != 2:
        return packed
    # What stands before the first row is never looked at.
    return torch.cat([mask[:, : mask.shape[-1] - len(columns)], packed], dim=-1)


def _query_tokens(args: Any, kwargs: Any) -> int:
    for name in ("input_ids", "inputs_embeds"):
        if (given := kwargs.get(name)) is not None:
            return int(given.shape[1])
    return int(args[0].shape[1])


def _after(module: Any, args: Any, kwargs: Any, output: Any) -> Any:
    """What it gives is the output in place of the pass's own, where that is not None."""
    del output
    cache = _own(module, args, kwargs)
    if cache is None:
        return None
    cache.end_forward()
    args, kwargs = _given.pop(cache, (args, kwargs))  # with the mask as it was given
    return cache.once_more(lambda: module(*args, **kwargs))
