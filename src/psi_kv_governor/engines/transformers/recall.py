"""Recall: what was taken out of a cache comes back when newer queries look for it (docs/how-it-works.md).

The queries of one layer at three fifths of the depth are made again, as for the policies, and held against
the live keys and the summaries of those that are parked. It all happens at the end of a forward pass, in its
thread, before anybody else can move rows.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from psi_kv_governor.cache import Range, cells_in
from psi_kv_governor.engines.transformers.cache import GovernedCache
from psi_kv_governor.engines.transformers.exchange import (
    BLOCK_CELLS,
    LAYER_DEPTH,
    Demand,
    Exchange,
    Shares,
    raise_to,
)
from psi_kv_governor.engines.transformers.hooks import module_of
from psi_kv_governor.engines.transformers.ledger import Ledger
from psi_kv_governor.engines.transformers.places import numbers_in
from psi_kv_governor.engines.transformers.queries import (
    Late,
    attention_modules,
    cap_of,
    logits_of,
    makes_these_keys,
    project,
    scale_of,
)
from psi_kv_governor.engines.transformers.rows import Rows
from psi_kv_governor.engines.transformers.versions import CACHE_NAMES
from psi_kv_governor.errors import EngineError
from psi_kv_governor.native.summaries import Bytes, Floats, Summarizer

EVERY = 8
"""Of tokens decoded one by one, one in so many is observed."""
TAIL_TOKENS = 16
"""Last tokens of a longer pass that are."""
MOST_SUMMARY = 0.02
"""Of a cell's bytes that its summary may take."""
LEAST_AGAIN, MOST_AGAIN = 3, 256
"""Tokens of a pass that may be done a second time."""

_log = logging.getLogger("psi_kv_governor")


class Recaller:
    """Recall of one cache. Everything but `why_not` happens under the cache's lock; nothing raises."""

    def __init__(self, cache: GovernedCache, ledger: Ledger) -> None:
        self.why_not = ""
        """Why it is off; '' as far as is known."""
        self.demand = Demand()
        self._cache, self._ledger = weakref.ref(cache), ledger
        self._summarizer: Summarizer | None = None
        self._summaries: Bytes = np.zeros((0, 0, 0), dtype=np.uint8)
        self._summarised = np.zeros(0, dtype=np.bool_)
        self._late: Late | None = None
        self._since = 0
        self._again = False
        try:
            self._modules = attention_modules(module_of(cache), cache)
        except StopIteration:
            self.why_not = "its model is gone"
            return
        indices = sorted(self._modules)
        if not indices:
            self.why_not = "this model's attention has no projections that can be repeated"
            return
        self._layer = indices[int(LAYER_DEPTH * len(indices))]
        hook = self._modules[self._layer].register_forward_pre_hook(self._keep, with_kwargs=True)
        self.close = weakref.finalize(cache, hook.remove)
        """Observe no more; by itself when the cache is gone."""

    @property
    def summary_bytes(self) -> int:
        """In memory for each parked cell."""
        return int(np.prod(self._summaries.shape[1:]))

    def _off(self, why: str) -> None:
        self.why_not = why
        self._summarised = np.zeros(0, dtype=np.bool_)
        self._summaries = np.zeros((0, 0, 0), dtype=np.uint8)
        _log.info("recall is off: %s", why)

    # -- summaries ---------------------------------------------------------------------------------------

    def summarise(self, gone: Sequence[Range], runs: Sequence[Range]) -> None:
        """The rows `runs`, of the positions `gone`, are about to be parked."""
        cache = self._cache()
        if cache is None or self.why_not or self._ledger.why_not or self._ledger.settings.mode == "off":
            return
        try:
            self._summarise(cache, gone, runs)
        except Exception as error:  # what is parked stays parked, as without recall
            self._off(str(error) or "no memory is left for summaries")

    def _summarise(self, cache: GovernedCache, gone: Sequence[Range], runs: Sequence[Range]) -> None:
        keys = cache.layers[self._layer].rows[0]
        summarizer = self._made(cache, keys, max(part.stop for part in gone))
        for part, run in zip(gone, runs, strict=True):
            for lane, address in enumerate(keys.lane_addresses):
                made = summarizer.make(address + run.start * keys.piece_bytes, keys.piece_bytes, run.cells)
                self._summaries[part.start : part.stop, lane] = made
            self._summarised[part.start : part.stop] = True

    def _made(self, cache: GovernedCache, keys: Rows, stop: int) -> Summarizer:
        if self._summarizer is None:
            self._summarizer = Summarizer(str(keys.dtype).removeprefix("torch."), keys.shape[2])
            if keys.lanes * self._summarizer.head_bytes > MOST_SUMMARY * cache.cell_bytes:
                raise EngineError("the summaries would take more than 2 % of what is parked")
        shape = (keys.lanes, self._summarizer.head_bytes)
        if self._summaries.shape[1:] != shape:
            self._summaries, self._summarised = np.zeros((0, *shape), dtype=np.uint8), self._summarised[:0]
        if len(self._summaries) < stop:  # of address space: zeros take no memory before they are written
            length = max(stop, 2 * len(self._summaries), cache.capacity_cells)
            grown = np.zeros((length, *shape), dtype=np.uint8)
            grown[: len(self._summaries)] = self._summaries
            self._summaries = grown
            self._summarised = np.pad(self._summarised, (0, length - len(self._summarised)))
        return self._summarizer

    def reorder(self, order: torch.Tensor) -> None:
        """The batch is put in another order."""
        cache = self._cache()
        if cache is None or not self._summarised.any():
            return
        parked = np.flatnonzero(self._summarised)
        heads = cache.tensors[0].shape[1]
        before = self._summaries[parked].reshape(len(parked), -1, heads, self._summaries.shape[2])
        after = before[:, order.numpy()].reshape(len(parked), -1, self._summaries.shape[2])
        if after.shape[1:] != self._summaries.shape[1:]:
            self._summaries = np.zeros((len(self._summaries), *after.shape[1:]), dtype=np.uint8)
        self._summaries[parked] = after

    def crop(self, length: int) -> None:
        """Positions from `length` on are gone."""
        self._summarised[length:] = False
        if not self._summarised.any():
            self._summaries, self._summarised = self._summaries[:0].copy(), self._summarised[:0].copy()

    # -- demand ------------------------------------------------------------------------------------------

    def _keep(self, module: Any, args: Any, kwargs: Any) -> None:
        cache = self._cache()
        if cache is None or self._again or not any(kwargs.get(name) is cache for name in CACHE_NAMES):
            return
        self._late = None
        if self.why_not or self._ledger.settings.mode == "off" or not cache.places.masked:
            if self.demand.observed:  # when pressure returns, other questions count
                self.demand = Demand()
            return
        hidden = kwargs.get("hidden_states", args[0] if args else None)
        angles = kwargs.get("position_embeddings")
        if not isinstance(hidden, torch.Tensor) or angles is None:
            self._off("this model's attention is called in a way that can't be repeated")
            return
        self._since += 1 if hidden.shape[1] == 1 else EVERY
        if self._since >= EVERY:
            start = cache.layers[module.layer_idx].get_seq_length()
            self._late = Late(hidden, angles[0], angles[1], start + hidden.shape[1])

    def after(self) -> bool:
        """A pass ended, and nothing runs: observe, and exchange what is wanted. Gives whether the same pass
        is to be done again, its tokens taken out."""
        cache, late, self._late = self._cache(), self._late, None
        if cache is None or late is None or late.stop != cache.places.next_position:
            return False
        self._since = 0
        tokens = int(late.hidden.shape[1])
        try:
            now = self._shares(cache, late.last(TAIL_TOKENS))
            if now is None:
                return False
            self.demand.observe(now)
            question = self._is_question(cache, tokens)
            return self._exchange(cache, question=question) and question
        except Exception as error:  # the model goes on without it
            self._off(f"it failed: {error}")
            return False

    def _is_question(self, cache: GovernedCache, tokens: int) -> bool:
        return (
            self._ledger.settings.mode == "ahead"
            and LEAST_AGAIN <= tokens <= MOST_AGAIN
            and tokens < cache.places.next_position
            and len(cache.governed) == len(cache.layers)
            and not cache.drafting
        )

    def _shares(self, cache: GovernedCache, late: Late) -> Shares | None:
        """The highest share of attention of each block: what it gets or, where it is parked, would get."""
        module, keys = self._modules[self._layer], cache.layers[self._layer].keys
        if not makes_these_keys(module, late, keys[:, :, -1:].float()):
            self._off("this model makes its keys in a way that can't be repeated")
            return None
        parked = numbers_in(cache.places.masked)
        parked = parked[parked < len(self._summarised)]
        parked = parked[self._summarised[parked]]
        if not len(parked):
            return None
        with torch.no_grad():
            queries = project(module, "q", late).float()
        batch, heads, _, width = keys.shape
        queries = queries.reshape(batch, heads, -1, late.hidden.shape[1], width)
        n_blocks = -(-cache.places.next_position // BLOCK_CELLS)
        best = np.full(n_blocks, -np.inf, dtype=np.float32)
        live = numbers_in(cache.places.live)
        for member in range(batch):
            for head in range(heads):
                asked = queries[member, head] * scale_of(module, width)
                seen = logits_of(asked, keys[member, head].float(), cap_of(module))
                summaries = self._summaries[parked, member * heads + head]
                found = self._parked_logits(asked.reshape(-1, width).numpy(), summaries, cap_of(module))
                all_ = seen.logsumexp(dim=1).numpy()[:, None]
                raise_to(best, live, seen.numpy() - all_)
                raise_to(best, parked, found - all_)
        return np.where(best > -np.inf, 1 / (1 + np.exp(-best)), np.float32(-1))

    def _parked_logits(self, queries: Floats, summaries: Bytes, cap: float) -> Floats:
        assert self._summarizer is not None, "something is summarised"
        found = self._summarizer.dots(queries, summaries)
        return found if not cap else (cap * np.tanh(found / cap)).astype(np.float32)

    # -- exchange ----------------------------------------------------------------------------------------

    def _exchange(self, cache: GovernedCache, *, question: bool) -> bool:
        settings = self._ledger.settings
        if settings.paused or cache.place is None:
            return False
        allowed = self._ledger.allowed_bytes() / cache.cell_bytes
        chosen = self.demand.choose(cache.places, settings, allowed, question=question)
        return chosen is not None and self._carry_out(cache, chosen)

    def _carry_out(self, cache: GovernedCache, chosen: Exchange) -> bool:
        """What goes, goes first: no more memory is taken than there was."""
        if cache.take_out(chosen.go, keep=True)[1]:
            return False
        cache.put_back(chosen.come)
        self._ledger.enter(cells_in(chosen.come) * cache.cell_bytes, chosen.blocks)
        return True

    def once_more(self, forward: Callable[[], Any]) -> Any:
        """Do a pass again, whose tokens were taken out: it is not observed a second time."""
        self._again = True
        try:
            return forward()
        finally:
            self._again = False
            self._ledger.decoded_again += 1
