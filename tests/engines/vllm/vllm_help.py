"""What vLLM's scheduler has, for tests of what is decided beside it: a block pool with its queue, requests
with blocks, outputs of steps. The real ones are in tests/vllm."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace

from psi_kv_governor.engines.vllm.engine import VllmEngine
from psi_kv_governor.engines.vllm.messages import About, Finished, Kind, Report
from psi_kv_governor.engines.vllm.messages import Step as WorkerStep
from psi_kv_governor.engines.vllm.scheduling import Scheduling
from psi_kv_governor.engines.vllm.wishes import Wish

TOKENS, BLOCK_BYTES = 16, 1 << 20


@dataclass
class Block:
    block_id: int
    ref_cnt: int = 0
    block_hash: str | None = None
    is_null: bool = False


@dataclass
class PoolOnPaper:
    """Blocks, and the free ones in the order in which they are used again."""

    n_blocks: int
    blocks: list[Block] = field(default_factory=list)
    queue: list[Block] = field(default_factory=list)

    def __post_init__(self):
        self.blocks = [Block(i) for i in range(self.n_blocks)]
        self.blocks[0].is_null = True
        self.queue = self.blocks[1:]

    @property
    def free_block_queue(self):
        return SimpleNamespace(get_all_free_blocks=lambda: list(self.queue))


class SchedulerOnPaper:
    """Gives blocks to requests, takes them back, and makes the steps that a connector sees."""

    def __init__(self, n_blocks: int = 32, ranks: int = 1):
        self.pool = PoolOnPaper(n_blocks)
        self.tables: dict[str, list[int]] = {}
        self.held: dict[str, bool] = {}
        self.ended: set[str] = set()
        self.requests: dict[str, SimpleNamespace] = {}
        self.new: dict[str, list[int]] = {}
        self.shared: dict[str, int] = {}
        self.preempted: set[str] = set()
        self.ranks = ranks
        self.side = Scheduling(n_blocks, TOKENS, ranks, BLOCK_BYTES)
        self.side.why_no_hold = ""
        self.side.requests._hold = lambda request, still: self.held.__setitem__(request.request_id, still)
        self.side.bind(SimpleNamespace(block_pool=self.pool, get_block_ids=lambda name: (self.tables[name],)))
        about = {rank: About("here", 1, BLOCK_BYTES, "file", "/there") for rank in range(ranks)}
        self.side.report(Report(about=about))

    def begin(self, name: str, tokens: int, shared: list[int] | None = None) -> None:
        blocks = list(shared or [])
        for block in blocks:
            self._touch(self.pool.blocks[block])
        while len(blocks) * TOKENS < tokens:
            block = self.pool.queue[0]
            block.block_hash = None
            self._touch(block)
            blocks.append(block.block_id)
        self.tables[name] = blocks
        request = SimpleNamespace(
            request_id=name,
            priority=0,
            arrival_time=float(len(self.requests)),
            num_computed_tokens=tokens,
            status=SimpleNamespace(name="RUNNING"),
        )
        self.requests[name] = request
        self.new[name] = blocks
        self.shared[name] = len(shared or []) * TOKENS
        self.side.admitted(request, blocks)

    def _touch(self, block: Block) -> None:
        if block in self.pool.queue:
            self.pool.queue.remove(block)
        block.ref_cnt += 1

    def free(self, name: str) -> None:
        """Whole blocks are found again by hash; the last one, which is not full, is not."""
        tokens = self.requests[name].num_computed_tokens
        for index, block in enumerate(self.tables.pop(name)):
            one = self.pool.blocks[block]
            one.ref_cnt -= 1
            if one.ref_cnt == 0:
                full = (index + 1) * TOKENS <= tokens
                one.block_hash = f"{name}-{index}" if full else None
                self.pool.queue.insert(len(self.pool.queue) if full else 0, one)

    def end(self, name: str) -> None:
        self.free(name)
        self.ended.add(name)

    def preempt(self, name: str) -> None:
        """As vLLM does by itself."""
        self.free(name)
        self.requests[name].status.name = "PREEMPTED"
        self.preempted.add(name)

    def step(self) -> WorkerStep:
        return self.side.step(self._output())

    def passes_over(self) -> bool:
        """Makes a step as the connector does; whether it concerned nobody."""
        output = self._output()
        if self.side.passes_over(output):
            return True
        self.side.step(output)
        return False

    def _output(self) -> SimpleNamespace:
        moving = {n: 1 for n in self.tables if not self.held.get(n)}
        output = SimpleNamespace(
            num_scheduled_tokens=moving,
            preempted_req_ids=self.preempted,
            finished_req_ids=self.ended,
            scheduled_new_reqs=[
                SimpleNamespace(req_id=name, block_ids=(blocks,), num_computed_tokens=self.shared[name])
                for name, blocks in self.new.items()
            ],
            scheduled_cached_reqs=SimpleNamespace(new_block_ids=[None], resumed_req_ids=set()),
        )
        self.ended, self.preempted, self.new = set(), set(), {}
        return output

    def answer(self, step: WorkerStep, problem: str = "") -> None:
        """As all ranks do at the end of a step that left nothing open."""
        for _ in range(self.ranks):
            finished = {}
            for order in step.orders:
                n_bytes = 0 if problem else len(order.blocks) * BLOCK_BYTES
                back = order.kind is Kind.BACK
                finished[order.number] = Finished(
                    0 if back or order.kind is Kind.WRITE else n_bytes, n_bytes if back else 0, 0, problem
                )
            self.side.report(Report(finished))

    def until_idle(self, rounds: int = 6) -> None:
        for _ in range(rounds):
            self.answer(self.step())


class Clock:
    """Stands still until it is moved: a busy machine's own goes on by a second between two lines."""

    def __init__(self, now_s: float = 1000.0) -> None:
        self.now_s = now_s

    def monotonic(self) -> float:
        return self.now_s


def asked(one: SchedulerOnPaper, *wishes: Wish) -> list:
    """The orders of the step after these were asked for."""
    one.side._wishes += wishes
    return list(one.step().orders)


def engine_of(one: SchedulerOnPaper) -> VllmEngine:
    return VllmEngine(one.side, "model", "0.32.0")


def sequences(one: SchedulerOnPaper) -> dict[int, object]:
    return {it.id: it for it in engine_of(one).snapshot().caches[0].sequences}
