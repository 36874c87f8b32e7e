"""Two contexts of one model get the same calls; one of them is parked, written behind, read back, masked and
released at random by another thread meanwhile. After every call their whole states must be the same bytes.
What the governor evicts of the one is removed of the other by llama.cpp's own call.

    python tests/engines/llama/torture.py --operations 1000000 --seed 1 --backing file
"""

from __future__ import annotations

import argparse
import ctypes
import random
import sys
import tempfile
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # it runs as a program of its own
from gguf_models import Shape, write_model
from psi_kv_governor.engines.llama import loader
from psi_kv_governor.engines.llama.client import Client, InProcess, Op, Reply

N_SEQ = 4
N_CTX = 2048
MOST = N_CTX // N_SEQ - 8
SHAPE = Shape("llama", n_layer=2, n_head_kv=2)


class Context:
    """A llama_context used through llama.cpp's own functions, as a foreign caller does."""

    def __init__(self, api, model, *, unified: bool, flash: bool, n_ubatch: int, callback=None) -> None:
        self.api = api
        params = api.llama_context_default_params()
        params.n_ctx = N_CTX
        params.n_batch = 256
        params.n_ubatch = n_ubatch
        params.n_seq_max = N_SEQ
        params.kv_unified = unified
        params.n_threads = params.n_threads_batch = 1
        params.flash_attn_type = 1 if flash else 0
        if callback is not None:
            params.cb_eval = callback
        self.ctx = api.llama_init_from_model(model, params)
        self.memory = api.llama_get_memory(self.ctx)
        self.buffer = (ctypes.c_uint8 * 1)()

    def decode(self, tokens: list[tuple[int, int, int]]) -> int:
        """(token, position, sequence) each."""
        batch = self.api.llama_batch_init(len(tokens), 0, 1)
        batch.n_tokens = len(tokens)
        for i, (token, position, sequence) in enumerate(tokens):
            batch.token[i] = token
            batch.pos[i] = position
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = sequence
            batch.logits[i] = i == len(tokens) - 1
        result = self.api.llama_decode(self.ctx, batch)
        self.api.llama_batch_free(batch)
        return result

    def state(self) -> memoryview:
        """Valid until the next call."""
        size = self.api.llama_state_get_size(self.ctx)
        if size > len(self.buffer):
            self.buffer = (ctypes.c_uint8 * (2 * size))()
        n = self.api.llama_state_get_data(self.ctx, self.buffer, size)
        return memoryview(self.buffer).cast("B")[:n]

    def sequence_state(self, sequence: int):
        size = self.api.llama_state_seq_get_size(self.ctx, sequence)
        buffer = (ctypes.c_uint8 * max(1, size))()
        self.api.llama_state_seq_get_data(self.ctx, buffer, size, sequence)
        return buffer, size


class Tormentor(threading.Thread):
    """Orders whatever changes no answer, of one region, at random, without end.

    What is decoded while something is masked is another answer, so a mask is on only while nobody decodes:
    it has to be gone from the next graph, and to change nothing that is read, copied, cut or saved meanwhile.
    """

    def __init__(self, client: Client, region: int, seed: int, decoding: threading.Lock) -> None:
        super().__init__(daemon=True)
        self.client, self.region, self.decoding = client, region, decoding
        self.random = random.Random(seed)
        self.done = 0
        self.cells = 0
        self.returned = 0
        self.masked = 0
        self.ends = threading.Event()

    def run(self) -> None:
        while not self.ends.is_set():
            if self.random.random() < 0.1:
                self.mask_for_a_moment()
            else:
                self.order(
                    self.random.choice(
                        [Op.PARK, Op.PARK, Op.UNPARK, Op.WRITE, Op.RELEASE, Op.SNAPSHOT, Op.SEQUENCE]
                    )
                )
            self.ends.wait(self.random.random() * 0.004)  # as often as the calls

    def mask_for_a_moment(self) -> None:
        with self.decoding:
            self.masked += self.order(self.random.choice([Op.MASK, Op.MARK])).masked
            self.ends.wait(self.random.random() * 0.004)
            self.order(Op.UNMASK)
            self.client.ask(Op.FORGET, self.region)

    def order(self, op: Op) -> Reply:
        sequence = self.random.randrange(-1, N_SEQ)
        start = self.random.randrange(0, 400)
        ranges = [(start, start + self.random.randrange(1, 400))] if self.random.random() < 0.5 else []
        most = self.random.choice([0, 1 << 16])
        reply = self.client.ask(op, self.region, sequence, ranges=ranges, max_bytes=most, flags=1)
        self.cells += reply.cells
        self.returned += reply.n_bytes if op in (Op.PARK, Op.MASK, Op.RELEASE) else 0
        self.done += 1
        return reply


class Twins:
    """A governed context and one that is left alone, which get the same calls."""

    def __init__(
        self,
        api,
        contexts: tuple[Context, Context],
        chance: random.Random,
        tormentor: Tormentor,
        *,
        unified: bool,
    ) -> None:
        self.api, self.contexts, self.chance, self.unified = api, contexts, chance, unified
        self.tormentor = tormentor
        self.evicted = 0
        self.lengths = [0] * N_SEQ

    def call(self) -> None:
        """Make one call at random."""
        often = {self.prompt: 60, self.step_all: 10, self.cut: 10, self.clear: 1}
        often |= dict.fromkeys((self.copy, self.shift, self.save_and_load, self.evict), 5)
        what = self.chance.choices(list(often), list(often.values()))[0]
        what(self.chance.randrange(N_SEQ))

    def prompt(self, s: int) -> None:
        n = min(self.chance.choice([1, 1, 1, 2, 7, 40, 200]), MOST - self.lengths[s])
        if n > 0:
            self.decode([(self.chance.randrange(3, 200), self.lengths[s] + i, s) for i in range(n)])

    def step_all(self, _: int) -> None:
        batch = [(self.chance.randrange(3, 200), n, i) for i, n in enumerate(self.lengths) if n < MOST]
        if batch:
            self.decode(batch)

    def decode(self, tokens: list[tuple[int, int, int]]) -> None:
        with self.tormentor.decoding:
            results = {context.decode(tokens) for context in self.contexts}
        assert len(results) == 1, results
        for _, _, s in tokens if results == {0} else ():
            self.lengths[s] += 1

    def cut(self, s: int) -> None:
        keep = self.chance.randrange(0, self.lengths[s] + 1)
        self.each(lambda context: self.api.llama_memory_seq_rm(context.memory, s, keep, -1))
        self.lengths[s] = keep

    def copy(self, s: int) -> None:
        other = self.chance.randrange(N_SEQ)
        if self.unified and other != s:
            self.each(lambda context: self.api.llama_memory_seq_rm(context.memory, other, -1, -1))
            self.each(lambda context: self.api.llama_memory_seq_cp(context.memory, s, other, -1, -1))
            self.lengths[other] = self.lengths[s]

    def shift(self, s: int) -> None:
        """A context shift, as llama-server does it."""
        if self.lengths[s] > 60:
            self.each(lambda context: self.api.llama_memory_seq_rm(context.memory, s, 10, 30))
            self.each(
                lambda context: self.api.llama_memory_seq_add(context.memory, s, 30, self.lengths[s], -20)
            )
            self.lengths[s] -= 20

    def save_and_load(self, s: int) -> None:
        for context in self.contexts if self.lengths[s] else ():
            buffer, size = context.sequence_state(s)
            self.api.llama_memory_seq_rm(context.memory, s, -1, -1)
            self.api.llama_state_seq_set_data(context.ctx, buffer, size, s)

    def evict(self, s: int) -> None:
        """An order, and yet a call: the states are compared after it. Other orders go on meanwhile."""
        if self.lengths[s] > 60:
            start = self.chance.randrange(0, self.lengths[s] - 40)
            stop = start + self.chance.randrange(1, 39)
            # The last position, from which it goes on, is never evicted; where a tail was, it may be here.
            stop = min(stop, self.api.llama_memory_seq_pos_max(self.contexts[0].memory, s))
            if start < stop:
                to = self.tormentor
                reply = to.client.ask(Op.EVICT, to.region, s, ranges=[(start, stop)])
                assert reply.done, reply.problem
                assert not reply.problem, reply.problem
                self.evicted += reply.cells
                self.api.llama_memory_seq_rm(self.contexts[1].memory, s, start, stop)

    def clear(self, s: int) -> None:
        self.each(lambda context: self.api.llama_memory_clear(context.memory, s % 2 == 0))
        self.lengths = [0] * N_SEQ

    def each(self, call) -> None:
        for context in self.contexts:
            call(context)

    def compare(self, where: str) -> None:
        """Raises AssertionError where the two states differ."""
        one, other = (context.state() for context in self.contexts)
        if one != other:
            at = next(i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
            raise AssertionError(f"{where}: the states differ at byte {at} of {len(one)} and {len(other)}")


def torture(
    operations: int, seed: int, *, backing: str, unified: bool, flash: bool, place: Path, model: Path
) -> str:
    """Run it; gives a line of figures. Raises AssertionError at the first difference."""
    loaded = loader.load()
    assert loaded.agent is not None, loaded.why
    import llama_cpp as api

    _silence(api)
    api.llama_backend_init()
    weights = api.llama_model_load_from_file(str(model).encode(), api.llama_model_default_params())
    client = Client(InProcess(loaded.agent.serve))
    chance = random.Random(seed)
    n_ubatch = chance.choice([16, 64, 256])
    contexts = []
    for in_file, where in ((backing == "file", str(place)), (False, "")):
        loaded.agent.configure(where, in_file=in_file, reserve_bytes=0, limit_bytes=0)
        contexts.append(Context(api, weights, unified=unified, flash=flash, n_ubatch=n_ubatch))
    loaded.agent.configure(str(place), in_file=backing == "file", reserve_bytes=0, limit_bytes=0)
    regions = client.regions(count_resident=False)
    assert [region.in_file for region in regions] == [backing == "file", False]
    tormentor = Tormentor(client, regions[0].id, seed + 1, threading.Lock())
    twins = Twins(api, (contexts[0], contexts[1]), chance, tormentor, unified=unified)
    begin_s, calls = time.monotonic(), 0
    tormentor.start()
    while calls + tormentor.done < operations:
        calls += 1
        twins.call()
        twins.compare(f"call {calls}, seed {seed}")
    tormentor.ends.set()
    tormentor.join()
    for context in contexts:
        api.llama_free(context.ctx)
    api.llama_model_free(weights)
    return (
        f"{calls} calls and {tormentor.done} orders in {time.monotonic() - begin_s:.0f} s, {tormentor.cells} "
        f"cells and {tormentor.returned / 1e6:.0f} MB given up, {tormentor.masked} masked, "
        f"{twins.evicted} evicted: no difference"
    )


def _silence(api) -> None:
    """llama.cpp tells of each state that is written, through Python: hundreds of lines a second. Any function
    of C that takes a number and does nothing hears it instead."""
    deaf = ctypes.cast(ctypes.CDLL(None).abs, api.llama_log_callback)
    api.llama_log_set(deaf, None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--operations", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--backing", choices=["file", "memory"], default="file")
    parser.add_argument("--streams", action="store_true", help="a cache of its own for each sequence")
    parser.add_argument("--no-flash", action="store_true")
    parser.add_argument("--place", type=Path, default=Path("/var/tmp"))
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print(
            torture(
                given.operations,
                given.seed,
                backing=given.backing,
                unified=not given.streams,
                flash=not given.no_flash,
                place=given.place,
                model=write_model(Path(folder) / "tiny.gguf", SHAPE),
            )
        )


if __name__ == "__main__":
    sys.exit(main())
