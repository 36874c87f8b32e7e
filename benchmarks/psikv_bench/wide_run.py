"""One size of the scale scene, in a process of its own: `wide_run MODEL CELLS BACKING THREADS`."""

from __future__ import annotations

import ctypes
import sys
import time
from pathlib import Path
from typing import Any

import msgspec

from psi_kv_governor.config import load_config
from psi_kv_governor.engines.llama import loader, process
from psi_kv_governor.engines.llama.client import Client, InProcess, Op, RegionInfo
from psi_kv_governor.errors import PsiKvError

PART = 1024
"""Tokens of a sequence, and cells of its stream."""
_BATCH = 512
_MAP_TIMES = 5


class Work(msgspec.Struct, kw_only=True):
    """What was given up or brought back, and how long that took."""

    n_bytes: int = 0
    seconds: float = 0.0

    def add(self, n_bytes: int, seconds: float) -> None:
        """Count more of it."""
        self.n_bytes += n_bytes
        self.seconds += seconds

    @property
    def cost(self) -> float:
        """Seconds a byte."""
        return self.seconds / max(1, self.n_bytes)


class Size(msgspec.Struct, kw_only=True):
    """What came of one size."""

    n_cells: int
    backing: str
    open_s: float
    opened_bytes: int
    map_s: list[float]
    mappings: int
    trim: Work
    trim_clean: Work
    restore: Work
    release: Work


class _Run:
    def __init__(self, model: Path, n_cells: int, backing: str, threads: int) -> None:
        loaded = loader.load()
        config = load_config(backing=backing, place_limit_bytes=1 << 50, status_socket=False)
        self.chosen = process.prepare(config)
        if loaded.agent is None or not self.chosen.folder or self.chosen.backing != backing:
            raise PsiKvError(loaded.why or f"no cache can be parked in this way: {self.chosen.why}")
        import llama_cpp

        self.api: Any = llama_cpp
        self.client = Client(InProcess(loaded.agent.serve))
        deaf = ctypes.cast(ctypes.CDLL(None).abs, llama_cpp.llama_log_callback)  # llama.cpp tells much
        llama_cpp.llama_log_set(deaf, None)
        llama_cpp.llama_backend_init()
        weights = llama_cpp.llama_model_load_from_file(
            str(model).encode(), llama_cpp.llama_model_default_params()
        )
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = n_cells, _BATCH, _BATCH
        params.n_seq_max, params.kv_unified = n_cells // PART, False
        params.n_threads = params.n_threads_batch = threads
        params.flash_attn_type = 1
        begin_s = time.monotonic()
        self.ctx = llama_cpp.llama_init_from_model(weights, params)
        self.size = Size(
            n_cells=n_cells, backing=backing, open_s=time.monotonic() - begin_s, map_s=[], mappings=0,
            opened_bytes=self.region(count=True).resident,
            trim=Work(), trim_clean=Work(), restore=Work(), release=Work(),
        )  # fmt: skip
        self.sequences = range(n_cells // PART)

    def region(self, *, count: bool = False) -> RegionInfo:
        """The one cache."""
        (region,) = self.client.regions(count_resident=count)
        if self.size_asked_for(region):
            return region
        raise PsiKvError("the cache is not born as asked for")

    def size_asked_for(self, region: RegionInfo) -> bool:
        """Whether it is in a file where that is what is measured."""
        return region.in_file == (self.chosen.backing == "file")

    def measure(self) -> Size:
        """All of it."""
        number = self.region().id
        for sequence in self.sequences:
            self._fill(sequence)
            self._timed(self.size.trim, Op.PARK, number, sequence)
            self._timed(self.size.restore, Op.UNPARK, number, sequence)
            self._timed(self.size.trim_clean, Op.PARK, number, sequence)
        self.size.mappings = _mappings(self.region().size)
        memory = self.api.llama_get_memory(self.ctx)
        for i in range(_MAP_TIMES):
            self.api.llama_memory_seq_rm(
                memory, i % len(self.sequences), PART - 1 - i, -1
            )  # what is known is stale
            begin_s = time.monotonic()
            self.client.cells(number, 0)
            self.size.map_s.append(time.monotonic() - begin_s)
        for sequence in self.sequences[::2]:
            self.client.ask(Op.UNPARK, number, sequence)
            self.api.llama_memory_seq_rm(memory, sequence, -1, -1)
            self._timed(self.size.release, Op.RELEASE, number, -1)
        return self.size

    def _timed(self, work: Work, op: Op, number: int, sequence: int) -> None:
        begin_s = time.monotonic()
        reply = self.client.ask(op, number, sequence)
        if reply.problem:
            raise PsiKvError(reply.problem)
        work.add(reply.n_bytes, time.monotonic() - begin_s)

    def _fill(self, sequence: int) -> None:
        for start in range(0, PART, _BATCH):
            batch = self.api.llama_batch_init(_BATCH, 0, 1)
            batch.n_tokens = _BATCH
            for i in range(_BATCH):
                batch.token[i], batch.pos[i] = 3 + (start + i + 7 * sequence) % 250, start + i
                batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = 1, sequence, i == _BATCH - 1
            if self.api.llama_decode(self.ctx, batch):
                raise PsiKvError("the model can't be decoded with")
            self.api.llama_batch_free(batch)


def _mappings(n_bytes: int) -> int:
    """Most mappings that lie side by side and are as large as the cache together."""
    spans = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, stop = (int(part, 16) for part in line.split(maxsplit=1)[0].split("-"))
        spans.append((start, stop))
    groups: list[list[tuple[int, int]]] = []
    for span in spans:
        if groups and groups[-1][-1][1] == span[0]:
            groups[-1].append(span)
        else:
            groups.append([span])
    large = [group for group in groups if group[-1][1] - group[0][0] >= n_bytes]
    return max((len(group) for group in large), default=0)


def main() -> None:
    """Print what came of it as JSON."""
    model, n_cells, backing, threads = sys.argv[1:5]
    found = _Run(Path(model), int(n_cells), backing, int(threads)).measure()
    print(msgspec.json.encode(found).decode())


if __name__ == "__main__":
    main()
