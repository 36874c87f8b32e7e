"""The contract of an engine, on the blocks and requests of one vLLM engine."""

from __future__ import annotations

import math
import time

from psi_kv_governor.cache import (
    CacheState,
    Capabilities,
    Capability,
    Description,
    Domain,
    Evidence,
    Kind,
    Plan,
    Range,
    Result,
    SequenceState,
    Snapshot,
    Step,
    Verb,
    cells_in,
    merged,
)
from psi_kv_governor.engines.vllm.messages import Finished
from psi_kv_governor.engines.vllm.requests import Running, positions_of
from psi_kv_governor.engines.vllm.scheduling import Scheduling
from psi_kv_governor.engines.vllm.wishes import PREFIXES, Wish
from psi_kv_governor.errors import EngineError

PATIENCE_S = 5.0
"""Longest that a step of the engine is waited for: a forward pass can't be interrupted."""
SLICE_S = 0.5
"""Longest that is waited for where the plan has no deadline of its own that is shorter."""
WORKS_S = 10.0
"""After its last step an engine counts as working for so long. Its free blocks without a hash are the next
that it gives away: released between two rounds of a benchmark, they cost each round 3,600 page faults, and a
step of the idle engine."""

_NO_BLOBS = "vLLM keeps no saved states: its prompt cache are the blocks themselves"


class VllmEngine:
    """See `psi_kv_governor.cache.Engine`. One cache: the block pool, over all ranks."""

    def __init__(self, scheduling: Scheduling, name: str, version: str) -> None:
        self._all = scheduling
        self._name = name
        self._version = version
        self._closed = False
        self._late: list[Wish] = []
        """What was asked for, and not over when its plan had to end."""

    def describe(self) -> Description:
        """See Engine."""
        ranks = list(self._all.ranks.values())
        why = self._all.why_not or ("" if ranks else "no worker has answered yet")
        first = ranks[0] if ranks else None
        place = first.place if first else ""
        why_park = why or ("" if place else "there is no folder that can hold parked bytes")
        hold = why_park or self._all.why_no_hold
        return Description(
            engine="vllm",
            capabilities=Capabilities(
                release=Capability(able=not why, why=why),
                park=Capability(able=not why_park, why=why_park),
                mask=Capability(able=not hold, why=hold),
                blobs=Capability(able=False, why=_NO_BLOBS),
                evict=Capability(
                    able=False, why="vLLM throws cached blocks away by itself when it needs them"
                ),
            ),
            domain=Domain.HOST,
            backing=first.backing if first else "memory",
            place=place,
            details={
                "vllm": self._version,
                "ranks": str(len(ranks)),
                "hosts": str(len({r.host for r in ranks})),
            },
        )

    def snapshot(self) -> Snapshot:
        """See Engine. Waits for no step."""
        if self._closed:
            raise EngineError("this engine was closed")
        every, ranks = self._all, list(self._all.ranks.values())
        if not ranks:
            return Snapshot(time_s=time.monotonic())
        free, block_bytes = every.free(), every.block_bytes
        sequences = [one for one in (self._prefixes(len(free.cached), len(free.parked)),) if one is not None]
        sequences += [self._running(one) for one in every.requests]
        cache = CacheState(
            id=0,
            name=self._name,
            pid=ranks[0].pid,
            capacity_cells=every.n_blocks * every.block_tokens,
            cell_bytes=max(1, block_bytes // every.block_tokens),
            row_bytes=max(1, block_bytes // every.block_tokens),
            resident_bytes=every.resident_bytes,
            maskable=False,
            why_not_maskable="attention of vLLM passes over no block: requests stand still whole",
            free_resident_bytes=len(free.bare) * block_bytes,
            free_soon_used_bytes=len(free.bare) * block_bytes if self._works() else 0,
            sequences=tuple(sequences),
        )
        return Snapshot(
            time_s=time.monotonic(),
            caches=(cache,),
            written_bytes=every.written_bytes,
            store_bytes=sum(rank.stored_bytes for rank in ranks),
        )

    def _works(self) -> bool:
        return time.monotonic() - self._all.last_used_s < WORKS_S

    def _prefixes(self, n_here: int, n_parked: int) -> SequenceState | None:
        """All cached blocks that nobody uses as one sequence, the least recently used first."""
        n_blocks, tokens = n_here + n_parked, self._all.block_tokens
        if not n_blocks:
            return None
        return SequenceState(
            id=PREFIXES,
            next_position=n_blocks * tokens,
            live=(Range(0, n_blocks * tokens),),
            parked_bytes=n_parked * self._all.block_bytes,
            last_used_s=self._all.last_used_s,
        )

    def _running(self, one: Running) -> SequenceState:
        tokens = max(1, one.request.num_computed_tokens)
        order = None
        if not one.still and not self._all.why_no_hold:
            stoppable = self._all.requests.may_stand_still
            order = stoppable.index(one) if one in stoppable else None
        masked: tuple[Range, ...] = ()
        if one.aside is not None:
            masked = self._masked(one, tokens)
        live = tuple(_less(Range(0, tokens), masked))
        return SequenceState(
            id=one.number,
            next_position=tokens,
            live=live,
            masked=masked,
            running=not one.still,
            last_used_s=self._all.last_used_s,
            preempt_order=order,
        )

    def _masked(self, one: Running, tokens: int) -> tuple[Range, ...]:
        """Positions of the blocks that still have to come back."""
        found = positions_of(self._all.groups(one), one.aside or set(), self._all.block_tokens, tokens)
        return tuple(merged([Range(*part) for part in found]))

    def apply(self, plan: Plan) -> Result:
        """See Engine. What a busy engine does not get to in time it does with its next step all the same, and
        its bytes count with the next plan."""
        started = time.monotonic()
        total, cells, masked, problems, done = self._came_late(), 0, 0, list[str](), True
        left = math.inf if plan.max_bytes is None else plan.max_bytes
        for step in plan.steps:
            spent_s = time.monotonic() - started
            if left <= 0 or spent_s >= plan.deadline_s:
                done = False
                break
            wish = self._asked(
                self._wish(step, left), max(SLICE_S, min(PATIENCE_S, plan.deadline_s - spent_s))
            )
            done = done and wish.over.is_set()
            total = total + wish.done
            left -= wish.done.bytes_returned + wish.done.bytes_back
            touched = len(wish.blocks) * self._all.block_tokens
            if step.verb in {Verb.PARK, Verb.MASK, Verb.UNMASK, Verb.UNPARK}:
                cells += touched
            masked += touched if step.verb is Verb.MASK else 0
            problems += [wish.done.problem] if wish.done.problem else []
        return Result(
            bytes_returned=total.bytes_returned,
            bytes_back=total.bytes_back,
            cells=cells,
            masked=masked,
            written_bytes=total.written_bytes,
            done=done,
            seconds=time.monotonic() - started,
            problem="; ".join(dict.fromkeys(problems)),
        )

    def _asked(self, wish: Wish, timeout_s: float) -> Wish:
        """Waits beyond its time for what the workers are doing already: the law would ask for it twice."""
        self._all.ask(wish, timeout_s)
        if wish.blocks:
            wish.over.wait(PATIENCE_S)
        if not wish.over.is_set():
            self._late.append(wish)
        return wish

    def _came_late(self) -> Finished:
        """What came of earlier plans after they had ended."""
        over = [wish for wish in self._late if wish.over.is_set()]
        self._late = [wish for wish in self._late if wish not in over]
        return sum((wish.done for wish in over), Finished(ranks=0))

    def _wish(self, step: Step, left: float) -> Wish:
        cell_bytes = max(1, self._all.block_bytes // self._all.block_tokens)
        n_bytes = self._all.n_blocks * self._all.block_bytes
        if step.sequence == PREFIXES and step.ranges:
            # What was parked before stands first in the range that is named, and costs nothing.
            parked = len(self._all.free().parked) * self._all.block_bytes if step.verb is Verb.PARK else 0
            n_bytes = cells_in(step.ranges) * cell_bytes - parked
        return Wish(
            step.verb,
            PREFIXES if step.sequence is None else step.sequence,
            n_bytes=int(min(n_bytes, left)),
            positions=tuple((part.start, part.stop) for part in step.ranges) or ((0, 1 << 40),),
        )

    def collect(self, kinds: frozenset[Kind]) -> None:
        """See Engine. vLLM's blocks are parked by use alone."""

    def evidence(self, cache: int, sequence: int) -> Evidence:
        """See Engine."""
        raise EngineError(f"vLLM tells nothing of the positions of sequence {sequence} in cache {cache}")

    def close(self) -> None:
        """See Engine. Who stands still goes on."""
        self._closed = True
        for one in self._all.requests.still:
            self._all.requests.go_on(one)


def _less(part: Range, gone: tuple[Range, ...]) -> list[Range]:
    left = [part]
    for hole in gone:
        left = [
            rest
            for one in left
            for rest in (
                Range(one.start, min(one.stop, hole.start)),
                Range(max(one.start, hole.stop), one.stop),
            )
            if rest.cells > 0
        ]
    return left
