"""The presses of NVIDIA's kvpress as policies of ours, and policies of ours as presses of kvpress."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import re
import sys
import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from psi_kv_governor.cache import Kind, Range, Values
from psi_kv_governor.engines.transformers.evidence import CacheEvidence, key_diffs, key_norms
from psi_kv_governor.engines.transformers.hooks import module_of
from psi_kv_governor.engines.transformers.queries import SAMPLED, Late, attention_of, used_of
from psi_kv_governor.errors import BadInputError
from psi_kv_governor.policy.base import Policy
from psi_kv_governor.policy.pool import top_mean, without_gaps

WORKING = (
    "KnormPress",
    "KeyDiffPress",
    "SnapKVPress",
    "TOVAPress",
    "ExpectedAttentionPress",
    "StreamingLLMPress",
    "RandomPress",
    "LagKVPress",
    "CURPress",
    "CapPress",
    "CriticalKVPress(KnormPress)",
    "PyramidKVPress",
)
"""Presses that are tested to score a cache by `score()` alone."""

_TOP_SHARE = 0.25  # of a block's positions count, as in our own policies: a fact is a handful of tokens


def load_press(name: str, **settings: Any) -> Any:
    """A press of kvpress by its class name, `Outer(Inner)` for one that is made of another. Importing it
    patches nothing of transformers.

    Raises BadInputError, in one line, where kvpress is absent or knows no such scorer.
    """
    if inner := re.fullmatch(r"(\w+)\((.+)\)", name):
        name, settings = inner[1], {"press": load_press(inner[2]), **settings}
    with _unpatched() as folder:
        if folder is None:
            raise BadInputError("kvpress is not installed: pip install --no-deps 'kvpress>=0.5.5,<0.6'")
        found = [file.stem for file in folder.glob("*.py") if f"\nclass {name}(" in file.read_text()]
        if not found:
            raise BadInputError(f"kvpress has no press called {name!r}: for instance {', '.join(WORKING)}")
        try:
            press = getattr(importlib.import_module(f"kvpress.presses.{found[0]}"), name)(**settings)
        except (ImportError, TypeError, AssertionError) as error:
            raise BadInputError(f"{name} of kvpress can't be made: {error}") from error
    if not callable(getattr(press, "score", None)):
        raise BadInputError(f"{name} of kvpress gives no scores, so that it can't be a policy here")
    return press


@contextlib.contextmanager
def _unpatched() -> Iterator[Path | None]:
    """The folder of kvpress' presses, importable without its package's own code, which patches attention."""
    spec = importlib.util.find_spec("kvpress")
    if spec is None or not spec.submodule_search_locations:
        yield None
        return
    bare = "kvpress" not in sys.modules
    if bare:
        package = types.ModuleType("kvpress")
        package.__path__ = list(spec.submodule_search_locations)
        sys.modules["kvpress"] = package
    try:
        yield Path(next(iter(spec.submodule_search_locations))) / "presses"
    finally:
        if bare:  # whoever imports kvpress later gets the real one
            del sys.modules["kvpress"]


@dataclass(frozen=True)
class KvpressPolicy(Policy):
    """A press of kvpress says which blocks go first."""

    name: ClassVar[str] = "kvpress"
    source: ClassVar[str] = "kvpress (NVIDIA)"
    needs: ClassVar[frozenset[Kind]] = frozenset({"attention"})

    press: str = "SnapKVPress"

    def __post_init__(self) -> None:
        load_press(self.press)

    def score(self, blocks: Sequence[Any], next_position: int, evidence: Any) -> Values:
        """Mean rank of each block's best positions over layers and heads, shape (len(blocks),)."""
        del next_position
        if not isinstance(evidence, CacheEvidence):
            raise BadInputError("presses of kvpress can score caches of transformers only")
        known = press_scores(load_press(self.press), evidence)
        if known is None:
            return np.zeros(len(blocks))
        return without_gaps(top_mean(blocks, lambda part: known[part.start : part.stop], _TOP_SHARE))


def press_scores(press: Any, evidence: CacheEvidence) -> Values | None:
    """What `press` thinks of each position: its mean rank (0 to 1) over layers, heads and batch; NaN where
    there is no row. None before the first tokens. Raises BadInputError where the press fails."""
    cache, watch = evidence.cache, evidence.watch
    watch.collect(frozenset({"attention"}), every_layer=True)
    with cache.at_rest(2.0) as still:
        queries = watch.queries
        if not still or queries is None or not cache.places.live_cells:
            return None
        ranked = []
        for index, module in sorted(queries.modules.items()):
            late, layer = queries.late(index), cache.layers[index]
            if late is None:
                return None
            given = {"position_embeddings": (late.cos, late.sin), "cache": cache, "past_key_values": cache}
            try:
                with torch.no_grad(), _rotary(module, module_of(cache)):
                    scores = press.score(module, late.hidden, layer.keys, layer.values, None, given)
            except Exception as error:  # somebody else's code, with whatever it raises
                first = (str(error).splitlines() or [""])[0]
                raise BadInputError(f"{type(press).__name__} can't score this cache: {first}") from error
            order = scores.argsort(dim=-1, stable=True).argsort(dim=-1).double()
            ranked.append(order.mean(dim=(0, 1)) / max(1, order.shape[-1] - 1))
        placed = np.full(cache.places.next_position, np.nan)
        placed[cache.places.live_positions()] = torch.stack(ranked).mean(dim=0).numpy()
        return placed


@contextlib.contextmanager
def _rotary(module: Any, model: Any) -> Iterator[None]:
    """Lend an attention module the model's rotary embedding, as kvpress does; not registered with it."""
    lent = getattr(model, "rotary_emb", None) if not hasattr(module, "rotary_emb") else None
    if lent is not None:
        vars(module)["rotary_emb"] = lent
    try:
        yield
    finally:
        if lent is not None:
            del vars(module)["rotary_emb"]


# -- the other way round -----------------------------------------------------------------------------------


def as_press(
    policy: Any, compression_ratio: float = 0.0, *, sinks: int = 64, window: int = 64, block: int = 16
) -> Any:
    """`policy` as a press of kvpress, so that its evaluation can run it. The first `sinks` and the last
    `window` positions are never pruned. Raises BadInputError where kvpress is absent."""
    base = type(load_press("KnormPress")).__mro__[1]  # ScorerPress

    def score(self: Any, module: Any, hidden_states: Any, keys: Any, *rest: Any) -> Any:
        del self
        length = keys.shape[-2]
        evidence = _LayerEvidence(module, hidden_states, keys, rest[-1])  # after values and attentions
        first, last = min(sinks, length), max(min(sinks, length), length - window)
        blocks = [Range(at, min(last, at + block)) for at in range(first, last, block)]
        found = policy.score(blocks, length, evidence) if blocks else np.empty(0)
        placed = np.full(length, np.inf)
        for part, number in zip(blocks, found, strict=True):
            placed[part.start : part.stop] = number
        known = placed[np.isfinite(placed)]
        placed[np.isinf(placed)] = (known.max() if len(known) else 0.0) + 1.0
        return torch.from_numpy(placed).to(keys.device, torch.float32).expand(*keys.shape[:2], length)

    press = type(f"{type(policy).__name__}Press", (base,), {"score": score})
    return press(compression_ratio=compression_ratio)


class _LayerEvidence:
    """An `Evidence` about one layer, from what kvpress hands to a press."""

    def __init__(self, module: Any, hidden: torch.Tensor, keys: torch.Tensor, given: Any) -> None:
        self._keys = keys.detach()
        self._attention: torch.Tensor | None = None
        if (angles := given.get("position_embeddings")) is not None:
            late = Late(hidden[:, -SAMPLED:], angles[0][:, -SAMPLED:], angles[1][:, -SAMPLED:])
            with torch.no_grad():
                self._attention = attention_of(module, late, self._keys.float())

    def why_not(self, kind: Kind) -> str:
        """See Evidence."""
        known = kind not in ("attention", "last_used") or self._attention is not None
        return "" if known else "this model's attention can't be repeated"

    def arrivals(self, part: Range) -> Values:
        """See Evidence."""
        return np.arange(part.start, part.stop, dtype=np.float64)

    def key_norms(self, part: Range) -> Values:
        """See Evidence."""
        return _cut(key_norms(self._keys), part)

    def key_diffs(self, part: Range) -> Values:
        """See Evidence."""
        return _cut(key_diffs(self._keys), part)

    def attention(self, part: Range) -> Values:
        """See Evidence."""
        if self._attention is None:
            return np.full(part.cells, np.nan)
        return _cut(self._attention.mean(dim=0), part)

    def demand(self, part: Range) -> Values:
        """See Evidence. Nothing is recalled while a press scores."""
        return np.full(part.cells, np.nan)

    def last_used(self, part: Range) -> Values:
        """See Evidence."""
        if self._attention is None:
            return np.full(part.cells, np.nan)
        return _cut(used_of(self._attention, self._keys.shape[-2]), part)


def _cut(of_rows: torch.Tensor, part: Range) -> Values:
    return np.asarray(of_rows.cpu().numpy()[part.start : part.stop], dtype=np.float64)
