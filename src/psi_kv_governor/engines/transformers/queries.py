"""The last hidden states before attention, from which late queries are made again."""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple

import numpy as np
import torch

from psi_kv_governor.cache import Values
from psi_kv_governor.engines.transformers.cache import GovernedCache
from psi_kv_governor.engines.transformers.hooks import module_of
from psi_kv_governor.engines.transformers.layer import GovernedLayer
from psi_kv_governor.engines.transformers.versions import CACHE_NAMES

WINDOW = 65
"""Hidden states kept a layer: what the presses of kvpress ask for at most (a window of 64 and the last)."""
SAMPLED = 32
"""Queries of these that attention is sampled with (SnapKV's window, arXiv 2404.14469)."""


class Late(NamedTuple):
    """The last tokens of one layer."""

    hidden: torch.Tensor
    """[batch, tokens, hidden]."""
    cos: torch.Tensor
    """[batch or 1, tokens, rotary_dim]."""
    sin: torch.Tensor
    stop: int = 0
    """The position after the last of them."""

    def last(self, tokens: int) -> Late:
        """The last so many of them, at most."""
        first = max(0, self.hidden.shape[1] - tokens)
        return Late(self.hidden[:, first:], self.cos[:, first:], self.sin[:, first:], self.stop)

    def before(self, position: int) -> Late:
        """Those before `position`: the others were cropped."""
        left = max(0, self.hidden.shape[1] - max(0, self.stop - position))
        return Late(self.hidden[:, :left], self.cos[:, :left], self.sin[:, :left], min(self.stop, position))


class Queries:
    """Keeps what the attention modules of a model are given for one cache."""

    def __init__(self, cache: GovernedCache, n_layers: int | None) -> None:
        self.every_layer = n_layers is None
        self.why_not = ""
        """Why attention can't be sampled of this model; '' as far as is known."""
        self._cache = weakref.ref(cache)
        self._late: dict[int, Late] = {}
        self._seen = 0
        self._used: dict[int, int] = {}
        self.modules = attention_modules(module_of(cache), cache)
        if not self.modules:
            self.why_not = "this model's attention has no projections that can be repeated"
        indices = sorted(self.modules)
        if n_layers is not None and len(indices) > n_layers:
            indices = [indices[i] for i in np.linspace(0, len(indices) - 1, n_layers).round().astype(int)]
        self._hooks = [
            self.modules[index].register_forward_pre_hook(self._keep, with_kwargs=True) for index in indices
        ]

        self.close = weakref.finalize(cache, _remove, self._hooks, self._late)
        """Keep nothing any more; by itself when the cache is gone."""

    def _keep(self, module: Any, args: Any, kwargs: Any) -> None:
        cache = self._cache()
        if cache is None or not any(kwargs.get(name) is cache for name in CACHE_NAMES):
            return
        hidden = kwargs.get("hidden_states", args[0] if args else None)
        cos, sin = kwargs["position_embeddings"]
        start = cache.layers[module.layer_idx].get_seq_length()
        new = Late(hidden.detach(), cos.detach(), sin.detach(), start + hidden.shape[1])
        old = self._late.get(module.layer_idx)
        if old is not None and old.hidden.shape[0] == new.hidden.shape[0]:
            old = old.before(start)
            joined = [torch.cat(pair, dim=1) for pair in zip(old[:3], new[:3], strict=True)]
            new = Late(joined[0], joined[1], joined[2], new.stop)
        kept = new.last(WINDOW)
        self._late[module.layer_idx] = Late(
            kept.hidden.clone(), kept.cos.clone(), kept.sin.clone(), kept.stop
        )

    def late(self, layer: int) -> Late | None:
        """The last tokens of a layer that still have rows, one after the other; None where there are none."""
        cache, late = self._cache(), self._late.get(layer)
        if cache is None or late is None:
            return None
        places = cache.places
        late = late.before(places.next_position)
        hole = max((hole.stop for hole in places.holes), default=0)
        late = late.last(max(0, late.stop - hole))
        whole = late.stop == places.next_position and late.hidden.shape[1] > 0
        return late if whole else None

    def sample(self) -> tuple[Values, Values] | None:
        """Attention of the last queries to each row (1 is an equal share), and the number of the newest that
        gave a row more than an equal share. At rest only; None where nothing is known."""
        cache = self._cache()
        if cache is None or self.why_not or not self._late:
            return None
        weights = [self._weights(cache, layer) for layer in sorted(self._late)]
        known = [it for it in weights if it is not None]
        if not known:
            return None
        mean = torch.stack(known).mean(dim=0)
        used = used_of(mean, cache.places.next_position)
        positions = cache.places.live_positions().tolist()
        for position, number in zip(positions, used.tolist(), strict=True):
            if number:
                self._used[position] = number
        last = np.array([self._used.get(position, 0) for position in positions], dtype=np.float64)
        return mean.mean(dim=0).double().numpy(), last

    def _weights(self, cache: GovernedCache, index: int) -> torch.Tensor | None:
        late = self.late(index)
        if late is None:
            return None
        late = late.last(SAMPLED)
        found = attention_of(self.modules[index], late, cache.layers[index].keys.float())
        if found is None:
            self.why_not = "this model makes its keys in a way that can't be repeated"
        return found


def attention_of(module: Any, late: Late, keys: torch.Tensor) -> torch.Tensor | None:
    """softmax(q.k) of the last queries to all `keys` [batch, heads, rows, head_dim], averaged over batch and
    heads, as multiples of an equal share: [queries, rows]. None where queries can't be made again."""
    if not makes_these_keys(module, late, keys):
        return None
    with torch.no_grad():
        queries = project(module, "q", late).float()
    groups, n_queries, rows = queries.shape[1] // keys.shape[1], queries.shape[2], keys.shape[2]
    queries = queries * scale_of(module, keys.shape[-1])
    scores = _capped(queries @ keys.repeat_interleave(groups, dim=1).transpose(-1, -2), cap_of(module))
    seen = torch.arange(rows)[None, :] <= torch.arange(rows - n_queries, rows)[:, None]
    seen = seen.to(scores.device)
    return scores.masked_fill(~seen, float("-inf")).softmax(dim=-1).mean(dim=(0, 1)) * rows


def used_of(shares: torch.Tensor, next_position: int) -> torch.Tensor:
    """Number of the newest query that gave a row more than an equal share, 0 where none did: (rows,)."""
    numbers = torch.arange(next_position - len(shares) + 1, next_position + 1, device=shares.device)
    return torch.where(shares > 1, numbers[:, None], 0).amax(dim=0)


def _remove(hooks: list[Any], late: dict[int, Late]) -> None:
    for handle in hooks:
        handle.remove()
    late.clear()


def attention_modules(model: Any, cache: GovernedCache) -> dict[int, Any]:
    """The attention of each governed layer, where its projections are apart and it knows its number."""
    found = {}
    for module in model.modules():
        index = getattr(module, "layer_idx", None)
        if isinstance(index, int) and hasattr(module, "q_proj") and hasattr(module, "k_proj"):
            found[index] = module
    governed = {i for i, layer in enumerate(cache.layers) if isinstance(layer, GovernedLayer)}
    return {index: module for index, module in found.items() if index in governed}


def project(module: Any, kind: str, late: Late) -> torch.Tensor:
    """Queries ("q") or keys ("k") of these tokens, rotated: [batch, heads, tokens, head_dim]."""
    batch, tokens, _ = late.hidden.shape
    states = getattr(module, f"{kind}_proj")(late.hidden).view(batch, tokens, -1, module.head_dim)
    if (norm := getattr(module, f"{kind}_norm", None)) is not None:
        states = norm(states)
    return _rotated(states.transpose(1, 2), late.cos.unsqueeze(1), late.sin.unsqueeze(1))


def _rotated(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """RoPE by halves, on as many dimensions as there are angles."""
    width = cos.shape[-1]
    turned, rest = states[..., :width], states[..., width:]
    half = torch.cat([-turned[..., width // 2 :], turned[..., : width // 2]], dim=-1)
    return torch.cat([turned * cos + half * sin, rest], dim=-1)


def makes_these_keys(module: Any, late: Late, keys: torch.Tensor) -> bool:
    """Whether the last key made again is the one in the cache: else queries made so would be wrong too."""
    try:
        with torch.no_grad():
            made = project(module, "k", late.last(1)).float()
    except (RuntimeError, AttributeError):
        return False
    last = keys[:, :, -1:].float()
    return made.shape == last.shape and bool(torch.allclose(made, last, rtol=2e-2, atol=2e-2))


def logits_of(queries: torch.Tensor, keys: torch.Tensor, cap: float) -> torch.Tensor:
    """Of the last tokens' queries [group, tokens, width], scaled, to the live keys [rows, width], each token
    seeing those before it: (group * tokens, rows)."""
    logits = _capped(queries @ keys.T, cap)
    tokens, rows = logits.shape[1:]
    ahead = torch.arange(rows)[None, :] > torch.arange(rows - tokens, rows)[:, None]
    return logits.masked_fill(ahead, float("-inf")).flatten(0, 1)


def _capped(logits: torch.Tensor, cap: float) -> torch.Tensor:
    """Within `cap` on both sides; as they are where it is 0."""
    return cap * torch.tanh(logits / cap) if cap else logits


def scale_of(module: Any, width: int) -> float:
    """What an attention module multiplies its logits with."""
    return float(getattr(module, "scaling", None) or width**-0.5)


def cap_of(module: Any) -> float:
    """Where it caps them; 0 where it does not."""
    return float(getattr(module, "attn_logit_softcapping", None) or 0.0)
