"""A layer of a cache as transformers wants it: rows in mappings of ours, stock in every other respect."""

from __future__ import annotations

import weakref
from typing import Any, Protocol

import torch
from transformers.cache_utils import CacheLayerMixin

from psi_kv_governor.engines.transformers.places import Places
from psi_kv_governor.engines.transformers.rows import Rows
from psi_kv_governor.engines.transformers.versions import query_length
from psi_kv_governor.errors import BadInputError


class Owner(Protocol):
    """What a layer asks of its cache."""

    @property
    def parked(self) -> bool:
        """Whether rows were parked since the last pass."""

    def bring_back(self, layer: GovernedLayer) -> None:
        """Have the rows of `layer` in memory."""

    def check_update(self) -> None:
        """Raises BadInputError unless the cache's own model is running."""

    def new_rows(self, sample: torch.Tensor) -> Rows:
        """Rows for states like `sample` [batch, heads, any, head_dim]."""


class GovernedLayer(CacheLayerMixin):  # type: ignore[misc]
    """Keys and values of one layer. All governed layers have the same positions at rest."""

    is_sliding = False
    is_croppable = True
    is_compileable = False

    def __init__(self, owner: Owner) -> None:
        # Not the base's: it would set `keys` and `values`, which are views here.
        self._owner = weakref.proxy(owner)  # a circle would keep the memory until the next collection
        self.places = Places()
        self.rows: tuple[Rows, Rows] | None = None
        self.is_initialized = False

    @property
    def keys(self) -> torch.Tensor | None:
        """Keys of the live positions, [batch, heads, live, head_dim]: a view, while nothing moves."""
        return self.rows[0].view(self.places.live_cells) if self.rows else None

    @property
    def values(self) -> torch.Tensor | None:
        """Values of the live positions, as `keys`."""
        return self.rows[1].view(self.places.live_cells) if self.rows else None

    @property
    def device(self) -> torch.device:
        """Where the rows are."""
        return torch.device("cpu")

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Make the mappings, which take no memory yet."""
        self.rows = self._owner.new_rows(key_states), self._owner.new_rows(value_states)
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append the new states and give all live ones. Raises BadInputError before anything is changed."""
        del args, kwargs
        self._owner.check_update()
        if self.rows is None:
            self.lazy_initialization(key_states, value_states)
        assert self.rows is not None
        for rows, states in zip(self.rows, (key_states, value_states), strict=True):
            _check_fits(rows, states)
        if self._owner.parked:
            self._owner.bring_back(self)
        live = self.places.live_cells
        for rows, states in zip(self.rows, (key_states, value_states), strict=True):
            rows.append(live, states)
        self.places.next_position += int(key_states.shape[-2])
        live += int(key_states.shape[-2])
        return self.rows[0].view(live), self.rows[1].view(live)

    def get_mask_sizes(self, query: Any) -> tuple[int, int]:
        """Rows that attention will see, and how far the first is shifted: as with a sliding window, all holes
        stand before it, so that the last row is at its true position."""
        live = self.places.live_cells
        return live + query_length(query), self.places.next_position - live

    def get_seq_length(self, *args: Any) -> int:
        """The next position: what was dropped still counts."""
        del args
        return self.places.next_position

    def get_max_length(self) -> int:
        """No maximum."""
        return -1

    get_max_cache_shape = get_max_length  # its older name

    def crop(self, tokens: int) -> None:
        """Remove the last `-tokens`; in older versions a positive number is the length to keep."""
        length = self.places.next_position + tokens if tokens <= 0 else tokens
        self.places.crop(max(0, length))

    def reset(self) -> None:
        """Forget everything."""
        self.places.crop(0)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Beam search goes on with other beams."""
        order = beam_idx.to("cpu")
        if self.rows is not None and not torch.equal(order, torch.arange(len(order))):
            for rows in self.rows:
                rows.reorder(self.places.live_cells, order)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each member of the batch several times."""
        if self.rows is not None:
            self.batch_select_indices(torch.arange(self.rows[0].shape[0]).repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Only these members of the batch."""
        if self.rows is None:
            return
        live, before = self.places.live_cells, self.rows
        everybody = torch.arange(before[0].shape[0])
        order = everybody[indices.to("cpu")]
        self.rows = before[0].with_members(live, order), before[1].with_members(live, order)
        for rows in before:
            rows.close()

    def offload(self) -> None:
        """Nothing to do: the rows are in host memory."""

    def prefetch(self) -> None:
        """Nothing to do."""


def _check_fits(rows: Rows, states: torch.Tensor) -> None:
    batch, heads, _, width = states.shape
    if states.requires_grad:
        raise BadInputError("a GovernedCache is for inference: call the model under torch.no_grad()")
    if states.device.type != "cpu":
        raise BadInputError(
            f"the model moved to {states.device} while its cache is in host memory: make a new GovernedCache"
        )
    if (batch, heads, width) != rows.shape or states.dtype != rows.dtype:
        raise BadInputError(
            f"this cache holds {rows.shape[0]} x {rows.shape[1]} heads of {rows.shape[2]} {rows.dtype}, and "
            f"was given {batch} x {heads} of {width} {states.dtype}: one GovernedCache is for one model and "
            "batch"
        )
