"""The scheduler's side: what the governor wishes becomes orders to the workers, step by step.

The governor's thread only asks and waits. Everything that looks at the block pool or stops a request is done
in the engine's own thread, at the end of its scheduling, when it is certain who uses which block.
"""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

from psi_kv_governor.cache import Verb
from psi_kv_governor.engines.vllm import unpublished
from psi_kv_governor.engines.vllm.blocks import Free, Ledger, first_bytes
from psi_kv_governor.engines.vllm.figures import Figures
from psi_kv_governor.engines.vllm.messages import About, Kind, Order, Report, Step
from psi_kv_governor.engines.vllm.outputs import got, left, unchanged
from psi_kv_governor.engines.vllm.requests import Requests, Running, blocks_at
from psi_kv_governor.engines.vllm.wishes import PREFIXES, Wish

_DECODED = "it is being decoded, and would be read back at once"

_LOOK_S = 0.1
"""Time between two readings of a far host while steps are made anyway, or headroom is low somewhere."""
_IDLE_LOOK_S = 1.0
"""The same while the engine is idle: an empty step takes about a millisecond."""
_WRITE_BLOCKS_BYTES = 64 << 20
"""Most that is written behind in one go."""


class Scheduling:
    """One engine's blocks and requests. Methods below `by the governor` are called in its thread, all others
    in the engine's."""

    def __init__(self, n_blocks: int, block_tokens: int, world_size: int, block_bytes: int) -> None:
        self.n_blocks = n_blocks
        self.block_tokens = block_tokens
        self.world_size = world_size
        self.ledger = Ledger(n_blocks)
        self.why_no_hold = unpublished.why_no_hold()
        self.why_no_list = "the block pool is not there yet"
        self.requests = Requests(unpublished.hold)
        self.ranks: dict[int, About] = {}
        self.looked_s = 0.0
        self.on_ready: Callable[[], None] = lambda: None
        """Called once, when every rank has said how it stands."""
        self.wake: Callable[[], None] = lambda: None
        """Ends the sleep of an idle engine."""
        self.far = False
        """Whether some rank is on another host, or in another cgroup, than this process."""
        self.hurry = False
        """Whether headroom is low somewhere."""
        self.written_bytes = 0
        self.figures = Figures()
        self.last_used_s = 0.0
        self._estimate_bytes = block_bytes
        self._manager: Any = None
        self._pool: Any = None
        self._wishes: deque[Wish] = deque()
        self._aside: list[tuple[Running, Wish]] = []
        self._open: dict[int, Wish] = {}
        self._numbers = itertools.count(1)
        self._fresh, self._blank = list[int](), list[int]()
        self._stored: set[int] = set()
        self._ready = False

    # -- what it knows ----------------------------------------------------------------------------------

    @property
    def block_bytes(self) -> int:
        """Bytes of a block on the host where it has the fewest: giving up so many blocks helps each host."""
        by_host: dict[str, int] = {}
        for about in list(self.ranks.values()):
            by_host[about.host] = by_host.get(about.host, 0) + about.block_bytes
        return min(by_host.values(), default=self._estimate_bytes)

    @property
    def resident_bytes(self) -> int:
        """Of the cache, over all ranks: counted by the kernel where they are not too large for it."""
        counted = sum(rank.resident_bytes for rank in list(self.ranks.values()))
        return counted or self.ledger.n_here * self.block_bytes

    @property
    def why_not(self) -> str:
        """Why nothing can be given up; '' where it can."""
        told = (about.why_not for about in self.ranks.values())
        return self.why_no_list or next(filter(None, told), "")

    def free(self) -> Free:
        """The free blocks now. From another thread it may be a moment old: good for amounts."""
        if self._pool is None or self.why_no_list:
            return Free([], [], [])
        for _ in range(3):
            try:
                return self.ledger.free(unpublished.free_list(self._pool))
            except (AttributeError, RuntimeError):  # the queue was changed meanwhile
                continue
        return Free([], [], [])

    def groups(self, one: Running) -> list[list[int]]:
        """The blocks of a request in the order of its positions, for each group of layers."""
        try:
            return [list(group) for group in self._manager.get_block_ids(one.request.request_id)]
        except (KeyError, AttributeError, AssertionError):
            return []

    # -- called by the connector, in the engine's thread ------------------------------------------------

    def bind(self, manager: Any) -> None:
        """The cache manager is there."""
        self._manager, self._pool = manager, manager.block_pool
        self.why_no_list = unpublished.why_no_free_list(self._pool)

    def admitted(self, request: Any, blocks: Iterable[int]) -> None:
        """A request has got blocks."""
        self.requests.admit(request)
        self._use(blocks)

    def may_admit(self) -> bool:
        """Whether new work may begin: not before those who stand still go on, as long as somebody does."""
        return not (self.requests.still and self.requests.moving)

    def pending(self) -> bool:
        """Whether an idle engine has to make a step for us."""
        return (
            bool(self._wishes or self._aside or self._open) or not self._ready or self._look_due(_IDLE_LOOK_S)
        )

    def passes_over(self, output: Any) -> bool:
        """Whether nothing of a scheduling concerns the workers, and so `step` has nothing to say."""
        waits = self._wishes or self._aside or self._fresh or self.requests.still or not self._ready
        if not waits and unchanged(output) and not self._look_due(_LOOK_S):
            self.last_used_s = time.monotonic()
            return True
        return False

    def step(self, output: Any) -> Step:
        """At the end of a scheduling: what the workers have to know and do."""
        scheduled = output.num_scheduled_tokens
        self._follow(output)
        if scheduled:
            self.last_used_s = time.monotonic()
        woken = self.requests.somebody_moves()
        if woken is not None:
            self._use(itertools.chain(*self.groups(woken)))
        orders = [*self._set_aside(scheduled), *self._resolved()]
        used, blank = self._taken()
        look = not self._ready or self._look_due(_LOOK_S) or bool(orders)
        return Step(used=used, blank=blank, orders=tuple(orders), idle=not scheduled, look=look)

    def report(self, report: Report) -> None:
        """What the workers answered."""
        for number, finished in report.finished.items():
            wish = self._open.get(number)
            if wish is None:
                continue
            wish.done = wish.done + finished
            if wish.done.ranks >= self.world_size:
                del self._open[number]
                self._ended(wish)
        if report.about:
            self.ranks.update(report.about)
            self.looked_s = time.monotonic()
        if not self._ready and len(self.ranks) >= self.world_size:
            self._ready = True
            self.on_ready()

    def told(self) -> dict[str, float]:
        """Figures for vLLM's own metrics; empty where nothing is new."""
        return self.figures.told(
            resident_bytes=self.resident_bytes,
            parked_bytes=len(self.free().parked) * self.block_bytes,
            standing_still=len(self.requests.still),
        )

    # -- by the governor --------------------------------------------------------------------------------

    def ask(self, wish: Wish, timeout_s: float) -> Wish:
        """Have it done, and wait for its end. It may end later than that."""
        self._wishes.append(wish)
        self.wake()
        wish.over.wait(timeout_s)
        return wish

    def look_again(self, low: bool) -> None:
        """Where readings of far hosts are old, an idle engine makes a step for them: soon where headroom is
        `low` on some host."""
        self.hurry = low
        if self._look_due(_IDLE_LOOK_S):
            self.wake()

    # -- inside -----------------------------------------------------------------------------------------

    def _look_due(self, every_s: float) -> bool:
        return self.far and time.monotonic() - self.looked_s >= (_LOOK_S if self.hurry else every_s)

    def _use(self, blocks: Iterable[int]) -> None:
        blocks = list(blocks)
        self._stored |= self.ledger.stored(blocks)
        self.ledger.came(blocks)
        self._fresh += blocks

    def _taken(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The blocks that are used from this step on, and those of them that a file holds for nobody."""
        used, blank = tuple(dict.fromkeys(self._fresh)), tuple(sorted(self._stored & set(self._blank)))
        self._fresh, self._blank, self._stored = [], [], set()
        return used, blank

    def _follow(self, output: Any) -> None:
        """Who got which blocks in this step, and who has none any more."""
        self.requests.leave(left(output, (one.request for one in self.requests.still)))
        found, blank = got(output, self.block_tokens)
        self._use(found)
        self._blank += blank

    def _own_blocks(self, one: Running) -> set[int]:
        """Those that hold tokens, and that nobody else uses: what is shared would be read back at once."""
        blocks = self._pool.blocks
        whole = [(0, max(1, one.request.num_computed_tokens))]
        there = blocks_at(self.groups(one), whole, self.block_tokens)
        return {block for block in there if getattr(blocks[block], "ref_cnt", 2) == 1}

    def _set_aside(self, scheduled: Any) -> list[Order]:
        """The blocks of those that stand still go with the first step in which nobody writes them."""
        orders, waiting = [], []
        for one, wish in self._aside:
            if one.request.request_id in scheduled:
                waiting.append((one, wish))
            elif one.aside is None:
                wish.end("it went on before its blocks were parked")
            else:
                orders.append(self._order(wish, Kind.PARK, one.aside))
        self._aside = waiting
        return orders

    def _resolved(self) -> list[Order]:
        orders = []
        while self._wishes:
            wish = self._wishes.popleft()
            kind, blocks = self._blocks_for(wish)
            if blocks:
                orders.append(self._order(wish, kind, blocks))
            elif not any(wish is waiting for _, waiting in self._aside):
                wish.end(_DECODED if wish.sequence != PREFIXES and wish.verb is Verb.PARK else "")
        return orders

    def _order(self, wish: Wish, kind: Kind, blocks: Iterable[int]) -> Order:
        order = Order(next(self._numbers), kind, tuple(sorted(blocks)))
        wish.blocks = order.blocks
        self._open[order.number] = wish
        if kind in {Kind.PARK, Kind.RELEASE}:
            self.ledger.went(order.blocks, stored=kind is Kind.PARK)  # at once: nobody gives them twice
        return order

    def _blocks_for(self, wish: Wish) -> tuple[Kind, Iterable[int]]:
        if wish.sequence != PREFIXES:
            return self._for_request(wish)
        if wish.verb is Verb.RELEASE:
            return Kind.RELEASE, self.free().bare
        free = self.free()
        if wish.verb is Verb.PARK:
            return Kind.PARK, first_bytes(free.cached, wish.n_bytes, self.block_bytes)
        if wish.verb is Verb.WRITE_BEHIND:
            return Kind.WRITE, first_bytes(free.cached, _WRITE_BLOCKS_BYTES, self.block_bytes)
        if wish.verb is Verb.UNPARK:  # the last used first
            return Kind.BACK, first_bytes(free.parked[::-1], wish.n_bytes, self.block_bytes)
        return Kind.PARK, ()

    def _for_request(self, wish: Wish) -> tuple[Kind, Iterable[int]]:
        one = self.requests.find(wish.sequence)
        if one is None:
            return Kind.PARK, ()
        if wish.verb is Verb.MASK and not one.still:
            if self.requests.stop(one, self._own_blocks(one)):
                self._aside.append((one, wish))
                self.figures.count(preemptions=1)
        elif wish.verb is Verb.UNMASK and one.aside is not None:
            return Kind.BACK, blocks_at(self.groups(one), wish.positions, self.block_tokens) & one.aside
        return Kind.PARK, ()

    def _ended(self, wish: Wish) -> None:
        done = wish.done
        self.written_bytes += done.written_bytes
        self.figures.count(
            returned_bytes=done.bytes_returned,
            read_back_bytes=done.bytes_back,
            written_bytes=done.written_bytes,
        )
        if wish.verb in {Verb.UNMASK, Verb.UNPARK}:
            self.ledger.came(wish.blocks)
            one = self.requests.find(wish.sequence)
            if one is not None and wish.verb is Verb.UNMASK:
                self.requests.came_back(one, wish.blocks)
        elif wish.done.problem and not wish.done.bytes_returned and wish.verb in {Verb.PARK, Verb.RELEASE}:
            self.ledger.came(wish.blocks)
        wish.end()
