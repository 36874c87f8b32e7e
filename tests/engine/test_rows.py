"""Rows as memory, on real pages with the compiled tap: a live row keeps its bytes, whatever is released."""

from __future__ import annotations

import ctypes
import mmap

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from psi_kv_governor.engine.llama import native
from psi_kv_governor.engine.llama.cells import CellMap
from psi_kv_governor.engine.llama.native import TensorInfo
from psi_kv_governor.engine.llama.rows import Rows, Tensor
from psi_kv_governor.errors import EngineError
from psi_kv_governor.policy.base import Range

pytestmark = pytest.mark.llama
PAGE = mmap.PAGESIZE
# f16 of 1 to 16 heads, and the odd sizes of quantised rows: 34 bytes is one block of q8_0.
ROW_BYTES = st.sampled_from([34, 68, 144, 204, 384, 544, 1024, 2048, 2176, 4096]) | st.integers(34, 4096)


class Cache:
    """Tensors side by side in one mapping, as in llama.cpp's buffer: neighbours share a page."""

    def __init__(self, row_bytes: list[int], n_cells: int, offset: int) -> None:
        starts = offset + np.cumsum([0, *(size * n_cells for size in row_bytes)])
        self.memory = mmap.mmap(-1, int(starts[-1]) + PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.bytes = np.frombuffer(self.memory, dtype=np.uint8)
        self.bytes[:] = np.random.default_rng(0).integers(1, 256, size=len(self.bytes), dtype=np.uint8)
        base = self.bytes.ctypes.data
        self.tensors = [
            Tensor(_info(f"cache_{'kv'[i % 2]}_l{i // 2}", base + int(start), size, n_cells))
            for i, (start, size) in enumerate(zip(starts, row_bytes, strict=False))
        ]
        self.rows = Rows(native.load(), self.tensors)

    def whole_pages(self, tensor: Tensor, first: int, last: int) -> range:
        """Addresses of the pages that cells [first, last) of a tensor fill."""
        begin, end = (tensor.info.base + cell * tensor.row_bytes for cell in (first, last))
        return range(-(-begin // PAGE) * PAGE, end // PAGE * PAGE, PAGE)


def _info(
    name: str, base: int, row_bytes: int, rows: int, *, host: int = 1, contiguous: int = 1
) -> TensorInfo:
    return TensorInfo(
        name=name.encode(),
        base=base,
        row_bytes=row_bytes,
        rows=rows,
        type=1,
        host=host,
        contiguous=contiguous,
    )


def runs(mask: list[bool]) -> list[tuple[int, int]]:
    edges = [i for i in range(len(mask) + 1) if (i < len(mask) and mask[i]) != (i > 0 and mask[i - 1])]
    return list(zip(edges[::2], edges[1::2], strict=True))


@settings(max_examples=120, deadline=None)
@given(
    st.lists(ROW_BYTES, min_size=1, max_size=4),
    st.integers(0, 2 * PAGE),
    st.lists(st.tuples(st.booleans(), st.integers(1, 40)), min_size=1, max_size=12),
)
def test_a_release_takes_every_whole_dead_page_and_no_live_byte(row_bytes, offset, stretches):
    live = [alive for alive, length in stretches for _ in range(length)]
    cache = Cache(row_bytes, len(live), offset)
    cells = CellMap(len(live))
    cells.place(0, np.arange(len(live)))
    for start, stop in runs([not alive for alive in live]):
        cells.lose(Range(start, stop))
    before = cache.bytes.copy()

    returned = cache.rows.release(cells.returnable())

    pages = {
        page
        for tensor in cache.tensors
        for start, stop in runs([not alive for alive in live])
        for page in cache.whole_pages(tensor, start, stop)
    }
    assert returned == len(pages) * PAGE
    gone = np.zeros(len(before), dtype=np.bool_)
    for page in pages:
        start = page - cache.bytes.ctypes.data
        gone[start : start + PAGE] = True
    np.testing.assert_array_equal(
        cache.bytes[~gone], before[~gone]
    )  # live rows, neighbours, and what is around
    assert not cache.bytes[gone].any()
    cells.released()
    assert cache.rows.release(cells.returnable()) == 0


def test_the_pages_left_at_an_edge_go_when_their_last_live_row_does():
    cache = Cache([384], 64, offset=0)
    cells = CellMap(64)
    cells.place(0, np.arange(64))
    returned = 0
    for start in (0, 11, 5, 30, 40, 16, 62, 21):  # pieces that end in the middle of pages
        cells.lose(Range(start, min(64, start + 9)))
        returned += cache.rows.release(cells.returnable())
        cells.released()
    cells.lose(Range(0, 64))
    returned += cache.rows.release(cells.returnable())
    assert returned == 64 * 384


def test_the_kernels_refusal_is_told():
    cache = Cache([4096], 8, offset=0)
    libc = ctypes.CDLL(None, use_errno=True)
    first = -(-cache.tensors[0].info.base // PAGE) * PAGE
    if libc.mlock(ctypes.c_void_p(first), ctypes.c_size_t(PAGE)) != 0:
        pytest.skip("this process may not lock memory (ulimit -l)")
    with pytest.raises(EngineError, match="refused to take pages back"):
        cache.rows.release(np.array([[0, 8, 0, 8]], dtype=np.int64))


@settings(max_examples=80, deadline=None)
@given(
    st.lists(ROW_BYTES, min_size=1, max_size=3),
    st.permutations(range(20)),
    st.lists(st.booleans(), min_size=20, max_size=20),
)
def test_chunks_are_the_rows_in_the_order_of_their_positions(row_bytes, order, wanted):
    cache = Cache(row_bytes, 20, offset=100)
    cells = np.array(order[:15], dtype=np.int64)
    blob = b"".join(cache.rows.chunks(cells))
    rows = [cache.rows._memory[i][cell].tobytes() for i in range(len(row_bytes)) for cell in cells]
    assert blob == b"".join(rows)

    # Read back in part: what is not wanted is read past, and its cells keep what they have by now.
    keep = np.array(wanted[:15])
    cache.bytes[:] = 0
    done = 0
    for chunk in cache.rows.chunks(cells, keep):
        chunk[:] = blob[done : done + len(chunk)]
        done += len(chunk)
    assert done == len(blob)
    expected = iter(rows)
    for i in range(len(row_bytes)):
        written = {int(cell): next(expected) for cell in cells}
        for cell in range(20):
            here = cache.rows._memory[i][cell].tobytes()
            back = cell in written and keep[order.index(cell)]
            assert here == (written[cell] if back else bytes(row_bytes[i]))


def test_neighbouring_cells_go_in_one_piece():
    cache = Cache([384], 64, offset=0)
    chunks = list(cache.rows.chunks(np.array([4, 5, 6, 9, 8, 10, 11])))
    assert [len(chunk) // 384 for chunk in chunks] == [3, 1, 1, 2]


@pytest.mark.parametrize("flaw", [{"host": 0}, {"contiguous": 0}])
def test_only_rows_in_reach_count(flaw):
    near, far = _info("cache_k_l0", 0, 384, 8), _info("cache_v_l0", 0, 512, 8, **flaw)
    memory = mmap.mmap(-1, 8 * 384)
    near.base = np.frombuffer(memory, dtype=np.uint8).ctypes.data
    rows = Rows(native.load(), [Tensor(near), Tensor(far)])
    assert rows.cell_bytes == 384
    assert [tensor.name for tensor in rows.tensors] == ["cache_k_l0"]


def test_the_layout_tells_types_and_sizes_apart():
    def layout(**changes: int) -> str:
        sizes = {"row_bytes": 384, "type": 1, **changes}
        info = _info("cache_k_l0", memory_base, sizes["row_bytes"], 8)
        info.type = sizes["type"]
        return Rows(native.load(), [Tensor(info)]).layout

    memory = mmap.mmap(-1, 8 * 384)
    memory_base = np.frombuffer(memory, dtype=np.uint8).ctypes.data
    assert layout() == layout()
    assert len({layout(), layout(type=8), layout(row_bytes=204)}) == 3


def test_a_saved_state_with_other_rows_is_told():
    cache = Cache([128, 128, 64, 64], 8, offset=0)  # K and V of two layers
    k0, v0, k1, v1 = (memory[3].tobytes() for memory in cache.rows._memory)
    saved = b"head" + k0 + b"...." + k1 + b"...." + v0 + b"...." + v1  # llama.cpp's order: K first
    assert cache.rows.are_in(saved, 3)
    assert not cache.rows.are_in(saved, 4)
    assert not cache.rows.are_in(saved[:-1], 3)
    assert not cache.rows.are_in(b"", 3)
