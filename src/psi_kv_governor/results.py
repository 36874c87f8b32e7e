"""What a result was computed without: said in the result, and by the governor where that is not possible."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from typing import Any

from psi_kv_governor.cache import Engine, Snapshot
from psi_kv_governor.errors import EngineError

_log = logging.getLogger("psi_kv_governor")


class Results:
    """The part of a Governor that knows of results."""

    engine: Engine
    healers: list[Callable[[], int]]
    """What decodes affected tokens again, of each model here. Whoever brings one takes it back."""
    _newest: tuple[float, dict[str, int]] = (-math.inf, {})

    @property
    def last_result(self) -> dict[str, int]:
        """What the newest result was computed without, `psi_kv` of a completion; empty where nothing was.

        A client that decodes by itself (guidance) makes no result that passes here: after it this is what
        the next token of its sequences would be computed without. Raises nothing.
        """
        time_s, said = self._newest
        try:
            snapshot = self.engine.snapshot()
        except EngineError:
            return said
        used_s = max((one.last_used_s for cache in snapshot.caches for one in cache.sequences), default=0.0)
        return said if used_s <= time_s else computed_without(snapshot)

    def tell_result(self, snapshot: Snapshot) -> dict[str, int]:
        """A result was made as things stand in `snapshot`. Gives what it was computed without."""
        self._newest = (snapshot.time_s, computed_without(snapshot))
        return self._newest[1]

    def heal(self) -> int:
        """Decode the tokens again that were decoded while others were masked, if there is room.

        Gives the number of tokens decoded. What is still masked is brought back first; while the machine is
        under pressure nothing is done. Call it where nobody generates. Raises EngineError where the model is
        not in this process, or decodes by itself: nobody here has its tokens.
        """
        if not self.healers:
            raise EngineError("no model here has its tokens: whoever decodes has to decode them again")
        return sum(healer() for healer in list(self.healers))


def computed_without(snapshot: Snapshot) -> dict[str, int]:
    """What the next token would be computed without; empty where nothing is missing."""
    sequences = [one for c in snapshot.caches if c.maskable or c.evictable for one in c.sequences]
    masked = max((one.masked_cells for one in sequences), default=0)
    affected = max((one.affected for one in sequences), default=0)
    lost = max((one.lost_cells for one in sequences), default=0)
    said = {"masked_tokens": masked, "affected_tokens": affected} if masked or affected or lost else {}
    return said | {"lost_tokens": lost} if lost else said


def annotated(governor: Results, result: Any) -> Any:
    """`result` of a completion, with `psi_kv` where it was computed without some of its context."""
    if isinstance(result, dict):
        return _annotate(governor, result)
    return _annotated_stream(governor, result) if isinstance(result, Iterator) else result


def _annotated_stream(governor: Results, chunks: Iterator[Any]) -> Iterator[Any]:
    for chunk in chunks:
        choices = (chunk.get("choices") or []) if isinstance(chunk, dict) else []
        last = any(choice.get("finish_reason") for choice in choices)
        yield _annotate(governor, chunk) if last else chunk


def _annotate(governor: Results, result: dict[str, Any]) -> dict[str, Any]:
    """Nothing in here may turn a finished answer into an exception."""
    try:
        if said := governor.tell_result(governor.engine.snapshot()):
            result["psi_kv"] = said
    except EngineError:
        pass  # the model was closed while its answer was made
    except Exception:
        _log.warning("a result is not marked", exc_info=True)
    return result
