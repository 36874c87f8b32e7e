"""`governed(model)`: every generate() of a model uses a governed cache from now on."""

from __future__ import annotations

import functools
from typing import Any, Literal

from psi_kv_governor.engines.transformers.cache import GovernedCache
from psi_kv_governor.engines.transformers.engine import TransformersEngine
from psi_kv_governor.engines.transformers.versions import CACHE_NAMES, cache_argument, check_versions
from psi_kv_governor.errors import BadInputError
from psi_kv_governor.residence import choose_backing, find_place, swap_state


def governed(
    model: Any,
    *,
    store_dir: str = "",
    backing: Literal["auto", "file", "memory"] = "auto",
    max_cells: int | None = None,
) -> TransformersEngine:
    """Have every `model.generate` without a cache of the caller's use a GovernedCache. Gives the engine.

    `store_dir` is the folder for parked bytes (empty: the first that will do), `backing` whether caches are
    born in a file there. `close()` of the engine undoes it. Raises BadInputError, in one line, for a model
    or a version that can't be governed; a machine without a place to park is no error.
    """
    check_versions()
    if getattr(model.config, "is_encoder_decoder", False):
        raise BadInputError("an encoder-decoder has two caches of another kind: it can't be governed")
    if "generate" in vars(model):
        raise BadInputError("this model is governed already: close() the engine first")
    search = find_place(store_dir)
    chosen, why = choose_backing(backing, search.place, *swap_state())
    engine = TransformersEngine(search.place, search.why_none)

    def new_cache() -> GovernedCache:
        cache = GovernedCache(model, place=search.place, backing=chosen, max_cells=max_cells)
        engine.add(cache)
        return cache

    new_cache().close()  # what can't be governed is told now, and not in the middle of a request
    engine.details = {"backing": why}
    stock = model.generate

    @functools.wraps(stock)
    def generate(*args: Any, **kwargs: Any) -> Any:
        if _wants_one(model, args, kwargs):
            kwargs[cache_argument()] = new_cache()
        return stock(*args, **kwargs)

    model.generate = generate
    engine.on_close.append(functools.partial(delattr, model, "generate"))
    return engine


def _wants_one(model: Any, args: Any, kwargs: Any) -> bool:
    """Whether this call leaves the cache to generate(), and to no special kind of cache."""
    if any(kwargs.get(name) is not None for name in CACHE_NAMES) or kwargs.get("use_cache") is False:
        return False
    settings = (
        kwargs.get("generation_config") or (args[1] if len(args) > 1 else None) or model.generation_config
    )
    special = kwargs.get("cache_implementation") or getattr(settings, "cache_implementation", None)
    return special in (None, "dynamic") and getattr(settings, "use_cache", True) is not False
