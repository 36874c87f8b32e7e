"""`GovernedCache`: a cache of transformers whose rows can be parked, masked and brought back."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from psi_kv_governor.cache import Range
from psi_kv_governor.engines.transformers.aside import Asides
from psi_kv_governor.engines.transformers.hooks import Follower, hook
from psi_kv_governor.engines.transformers.layer import GovernedLayer
from psi_kv_governor.engines.transformers.passes import Passes
from psi_kv_governor.engines.transformers.places import Places, numbers_in
from psi_kv_governor.engines.transformers.rows import Rows
from psi_kv_governor.engines.transformers.versions import check_versions
from psi_kv_governor.errors import BadInputError
from psi_kv_governor.residence import Backing, Place

_CELLS_IN_FILE = 2048
"""First size of a cache that is born in a file, whose space is taken beforehand; it doubles when full."""
_CELLS_IN_MEMORY = 1 << 15  # of address space only: nothing is taken before it is used

_ids = itertools.count()


class GovernedCache(Passes, Cache):  # type: ignore[misc]
    """A cache for `model.generate(..., cache=GovernedCache(model))` (`past_key_values=` in older versions).

    Layers with full attention on the CPU are governed; sliding windows, recurrent states and layers on a
    device stay what they are in a DynamicCache. A batch is one sequence to the governor: its members keep or
    give up the same positions. Views of keys and values are good until the next step.
    """

    def __init__(
        self,
        model: Any,
        *,
        place: Place | None = None,
        backing: Backing = "memory",
        max_cells: int | None = None,
    ) -> None:
        """A cache for `model`, parked in `place` (None: it can give up memory only for good).

        `max_cells` is how many positions are expected: more are taken too, at the price of a copy. Raises
        BadInputError, in one line, for a model that has nothing to govern.
        """
        check_versions()
        stock = DynamicCache(config=model.config.get_text_config(decoder=True)).layers
        if not any(type(layer) is DynamicLayer for layer in stock):
            kinds = ", ".join(sorted({type(layer).__name__ for layer in stock})) or "none"
            raise BadInputError(
                f"this model has no layer with full attention to govern (its layers: {kinds})"
            )
        if all(parameter.device.type != "cpu" for parameter in model.parameters()):
            raise BadInputError(
                f"the model is on {model.device}, whose memory can't be returned page by page: keep it on "
                "the CPU, or use a stock cache"
            )
        Cache.__init__(
            self, layers=[GovernedLayer(self) if type(layer) is DynamicLayer else layer for layer in stock]
        )
        Passes.__init__(self)
        self.id = next(_ids)
        self.place = place
        self.backing: Backing = backing if place is not None else "memory"
        self.max_cells = max_cells
        self.name = str(getattr(model.config, "name_or_path", "") or type(model).__name__)
        longest = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
        self.capacity_cells = int(max_cells or longest or _CELLS_IN_MEMORY)
        """Positions that are expected at most."""
        self.asides = Asides()
        self.written_bytes = 0
        self.affected = 0
        """Tokens that were decoded while others were masked or lost."""
        self.last_used_s = 0.0
        self.recaller: Follower | None = None
        self.parked = False
        """Rows were parked since the last pass."""
        self.drafting = False
        """A part of the last pass was taken back: its tokens were drafts, and no question."""
        self._again = False
        self._pass = Range(0, 0)
        hook(model, self)

    def new_rows(self, sample: torch.Tensor) -> Rows:
        """See Owner."""
        usual = _CELLS_IN_FILE if self.backing == "file" else _CELLS_IN_MEMORY
        return Rows(sample, self.max_cells or usual, self.backing, self.place)

    def bring_back(self, layer: GovernedLayer) -> None:
        """See Owner. The disk reads the next layer's rows while this one's are computed with."""
        layers = self.governed
        at = layers.index(layer)
        for one in layers[at : at + 2]:
            for rows in one.rows or ():
                rows.expect()
        for rows in layer.rows or ():
            rows.bring_back()

    def pass_ended(self) -> None:
        """See Passes."""
        self._settle()
        self.parked = False
        self.last_used_s = time.monotonic()
        self._pass = Range(self._began, self.places.next_position)
        self.drafting = self.drafting and self._pass.cells > 1
        if self.recaller is not None and self.recaller.after():
            self._again = True
            super().crop(-self._pass.cells)
            self.affected -= self._pass.cells

    def once_more(self, forward: Callable[[], Any]) -> Any:
        """After a pass: do it again where recall brought in what it asked for; None where it did not."""
        if not self._again or self.recaller is None:
            return None
        self._again = False
        return self.recaller.once_more(forward)

    def update(self, key_states: Any, value_states: Any, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """As of any cache. A layer that turns out to be on a device is left to a stock layer."""
        layer = self.layers[layer_idx]
        if isinstance(layer, GovernedLayer) and layer.rows is None and key_states.device.type != "cpu":
            self.layers[layer_idx] = DynamicLayer()
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def _settle(self) -> None:
        """After a pass that ended in the middle, layers have different lengths: the shortest counts."""
        lengths = {layer.places.next_position for layer in self.governed}
        if len(lengths) > 1:
            for layer in self.governed:
                layer.places.crop(min(lengths))

    def crop(self, tokens: int) -> None:
        """See Cache."""
        with self.lock:
            super().crop(tokens)
            self.drafting = self._pass.start < self.places.next_position < self._pass.stop
            self._drop_what_was_cropped()

    def reset(self) -> None:
        """See Cache."""
        with self.lock:
            super().reset()
            self._drop_what_was_cropped()
            self.release()

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """See Cache. What is parked is put in order when it comes back."""
        with self.lock:
            super().reorder_cache(beam_idx)
            self._reordered(beam_idx.to("cpu"))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """See Cache."""
        with self.lock:
            members = self.batch
            super().batch_repeat_interleave(repeats)
            self._reordered(torch.arange(members).repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """See Cache."""
        with self.lock:
            order = torch.arange(self.batch)[indices.to("cpu")]
            super().batch_select_indices(indices)
            self._reordered(order)

    def __deepcopy__(self, memo: Any) -> GovernedCache:
        raise BadInputError(
            "a GovernedCache can't be copied: make a second one, or crop() it back to the common beginning"
        )

    def _reordered(self, order: torch.Tensor) -> None:
        self.asides.reorder(order)
        if self.recaller is not None:
            self.recaller.reorder(order)

    def _drop_what_was_cropped(self) -> None:
        self.asides.crop(self.places.next_position)
        self.asides.tidy(self.places.masked, self.tensors, self.place)
        if self.recaller is not None:
            self.recaller.crop(self.places.next_position if self.places.masked else 0)
        self.affected = min(self.affected, self.places.next_position)

    @property
    def governed(self) -> list[GovernedLayer]:
        """The layers that are governed."""
        return [layer for layer in self.layers if isinstance(layer, GovernedLayer)]

    @property
    def tensors(self) -> list[Rows]:
        """K and V of every governed layer that has rows."""
        return [rows for layer in self.governed if layer.rows for rows in layer.rows]

    @property
    def places(self) -> Places:
        """Which positions have rows; at rest the same in every governed layer."""
        return self.governed[0].places

    @property
    def batch(self) -> int:
        """Members of the batch; 0 before the first."""
        return self.tensors[0].shape[0] if self.tensors else 0

    @property
    def cell_bytes(self) -> int:
        """Bytes of one position: its K and V rows in every governed layer, for the whole batch."""
        return sum(rows.row_bytes for rows in self.tensors)

    def release(self) -> int:
        """Return the pages of rows that hold nothing any more. Gives the bytes."""
        live = self.places.live_cells
        return sum(rows.release(live) for rows in self.tensors)

    def take_out(self, ranges: Sequence[Range], *, keep: bool) -> tuple[int, str]:
        """Take live positions out of the rows, kept aside (or, without `keep`, lost). All layers or none.

        Gives the bytes that the system has again, and what went wrong. Only at rest.
        """
        gone = self.places.live_part(ranges)
        if not gone or not self.tensors:
            return 0, ""
        runs = self.places.rows_of(gone)
        if keep and (problem := self._set_aside(gone, runs)):
            return 0, problem
        live = self.places.live_cells
        for rows in self.tensors:
            rows.close_up(live, runs)
        for layer in self.governed:
            (layer.places.mask if keep else layer.places.lose)(gone)
        return self.release(), ""

    def _set_aside(self, gone: Sequence[Range], runs: Sequence[Range]) -> str:
        if self.place is None:
            return "there is no folder that can hold parked bytes"
        before = self.asides.written_bytes
        problem = self.asides.put(gone, runs, self.tensors, self.place)
        self.written_bytes += self.asides.written_bytes - before
        if not problem and self.recaller is not None:
            self.recaller.summarise(gone, runs)
        return problem

    def put_back(self, ranges: Sequence[Range]) -> int:
        """Give masked positions their rows again, bit for bit. Gives their number. Only at rest.

        Raises OSError or MemoryError before anything was changed.
        """
        back = self.places.masked_part(ranges)
        if not back:
            return 0
        positions = numbers_in(back)
        sources = self.asides.sources(positions)
        live = self.places.live_cells
        for rows in self.tensors:
            rows.make_room(live, live + len(positions))
        for layer in self.governed:
            layer.places.unmask(back)
        runs = self.places.rows_of(back)
        into = numbers_in(runs)
        for index, rows in enumerate(self.tensors):
            rows.open_up(live, runs)
            for aside, found in sources:
                where = torch.from_numpy(into[np.searchsorted(positions, found)])
                rows.at(0, rows.capacity).index_copy_(2, where, aside.take(index, found))
                aside.forget(index)
        self._drop_what_was_cropped()
        return len(positions)

    def close(self) -> None:
        """Give all memory back. What still looks at keys or values sees zeros."""
        with self.lock:
            for rows in self.tensors:
                rows.close()
            self.asides.close()
            for layer in self.governed:
                layer.rows, layer.is_initialized, layer.places = None, False, Places()
