"""What a scheduling of vLLM says of blocks: who has none any more, who got which, and which are blank."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any


def unchanged(output: Any) -> bool:
    """Whether all who run ran before, and nobody got a block or lost one: most steps."""
    cached = output.scheduled_cached_reqs
    return bool(
        output.num_scheduled_tokens
        and not output.scheduled_new_reqs
        and not output.finished_req_ids
        and not getattr(output, "preempted_req_ids", None)
        and not getattr(cached, "resumed_req_ids", None)
        and not any(cached.new_block_ids)
    )


def left(output: Any, still: Iterable[Any]) -> set[str]:
    """The requests that hold no blocks any more; of those that stand `still` vLLM may have preempted some."""
    preempted = set(getattr(output, "preempted_req_ids", None) or ())
    preempted |= {
        one.request_id
        for one in still
        if getattr(getattr(one, "status", None), "name", "RUNNING") != "RUNNING"
    }
    admitted = {new.req_id for new in output.scheduled_new_reqs}
    admitted |= set(getattr(output.scheduled_cached_reqs, "resumed_req_ids", ()))
    return (preempted - admitted) | set(output.finished_req_ids)


def got(output: Any, block_tokens: int) -> tuple[list[int], list[int]]:
    """The blocks that requests got, and those of them that hold nothing yet: whoever got them writes each
    token in them before he reads it."""
    found: list[int] = []
    blank: list[int] = []
    for new in output.scheduled_new_reqs:
        found += itertools.chain(*new.block_ids)
        blank += _beyond(new.block_ids, getattr(new, "num_computed_tokens", None), block_tokens)
    cached = output.scheduled_cached_reqs
    resumed = set(getattr(cached, "resumed_req_ids", ()))
    names = getattr(cached, "req_ids", ())
    computed = getattr(cached, "num_computed_tokens", ())
    for name, tokens, blocks in itertools.zip_longest(names, computed, cached.new_block_ids):
        if blocks:
            found += itertools.chain(*blocks)
            # Who runs already gets only blocks that are beyond what he has.
            blank += _beyond(blocks, tokens if name in resumed else 0, block_tokens)
    if getattr(
        output, "kv_cache_block_copies", None
    ):  # some hold, before anybody writes, what is copied there
        return found, []
    return found, blank


def _beyond(groups: Sequence[Sequence[int]], computed: int | None, block_tokens: int) -> list[int]:
    """The blocks behind the first `computed` tokens. None are known where layers are in several groups, whose
    blocks may hold different numbers of tokens."""
    if computed is None or len(groups) != 1:
        return []
    return list(groups[0][-(-computed // block_tokens) :])
