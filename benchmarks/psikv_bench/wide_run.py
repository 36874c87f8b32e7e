"""One size of the scale scene, in a process of its own: `wide_run MODEL CELLS BACKING THREADS`."""

from __future__ import annotations

import itertools
import sys
import time
from pathlib import Path

import msgspec

from psi_kv_governor.engines.llama.client import Client, InProcess, Op, RegionInfo
from psi_kv_governor.errors import PsiKvError
from psikv_bench.raw_context import PART, RawContext

_MAP_TIMES = 5


class Work(msgspec.Struct, kw_only=True):
    """What was given up or brought back, and how long that took."""

    n_bytes: int = 0
    seconds: float = 0.0

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
    map_s: list[float] = msgspec.field(default_factory=list)
    mappings: int = 0
    trim: Work = msgspec.field(default_factory=Work)
    trim_clean: Work = msgspec.field(default_factory=Work)
    restore: Work = msgspec.field(default_factory=Work)
    release: Work = msgspec.field(default_factory=Work)


class _Run(RawContext):
    """A stream of PART cells for each sequence."""

    def __init__(self, model: Path, n_cells: int, backing: str, threads: int) -> None:
        n_seq, much = n_cells // PART, 1 << 50
        super().__init__(
            model, n_cells, threads, n_seq, unified=False, backing=backing, place_limit_bytes=much
        )
        self._client = Client(InProcess(self.agent.serve))
        region = self._region(count=True)
        if self.chosen.backing != backing or region.in_file != (backing == "file"):
            raise PsiKvError(f"the cache is not born as asked for: {self.chosen.why}")
        self._number, self._sequences = region.id, range(n_seq)
        self.size = Size(n_cells=n_cells, backing=backing, open_s=self.open_s, opened_bytes=region.resident)

    def _region(self, *, count: bool = False) -> RegionInfo:
        (region,) = self._client.regions(count_resident=count)
        return region

    def measure(self) -> Size:
        """All of it."""
        size = self.size
        for sequence in self._sequences:
            self.read([3 + (place + 7 * sequence) % 250 for place in range(PART)], sequence)
            self._timed(size.trim, Op.PARK, sequence)
            self._timed(size.restore, Op.UNPARK, sequence)
            self._timed(size.trim_clean, Op.PARK, sequence)
        size.mappings = _mappings(self._region().size)
        for i in range(_MAP_TIMES):
            # What is known is stale after it.
            self.api.llama_memory_seq_rm(self.memory, i % len(self._sequences), PART - 1 - i, -1)
            begin_s = time.monotonic()
            self._client.cells(self._number, 0)
            size.map_s.append(time.monotonic() - begin_s)
        for sequence in self._sequences[::2]:
            self._client.ask(Op.UNPARK, self._number, sequence)
            self.api.llama_memory_seq_rm(self.memory, sequence, -1, -1)
            self._timed(size.release, Op.RELEASE, -1)
        return size

    def _timed(self, work: Work, op: Op, sequence: int) -> None:
        begin_s = time.monotonic()
        reply = self._client.ask(op, self._number, sequence)
        if reply.problem:
            raise PsiKvError(reply.problem)
        work.n_bytes += reply.n_bytes
        work.seconds += time.monotonic() - begin_s


def _mappings(n_bytes: int) -> int:
    """Most mappings that lie side by side and are as large as the cache together."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    spans = [[int(part, 16) for part in line.split(maxsplit=1)[0].split("-")] for line in lines]
    begins = [0, *(i for i in range(1, len(spans)) if spans[i - 1][1] != spans[i][0]), len(spans)]
    groups = [spans[begin:end] for begin, end in itertools.pairwise(begins)]
    return max((len(group) for group in groups if group[-1][1] - group[0][0] >= n_bytes), default=0)


if __name__ == "__main__":
    with _Run(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3], int(sys.argv[4])) as run:
        print(msgspec.json.encode(run.measure()).decode())
