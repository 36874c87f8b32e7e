"""Which blocks are in memory, and where their bytes are."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from psi_kv_governor.engines.vllm.blocks import Free, Ledger, first_bytes
from psi_kv_governor.engines.vllm.layout import Layout, LayoutError, Run, View, layout_of


def test_a_block_that_was_never_used_is_not_given_up():
    ledger = Ledger(8)
    ledger.came([2, 3])
    assert ledger.free([(1, False), (2, True), (3, False), (4, True)]) == Free([2], [4], [3])


def test_a_block_counts_as_gone_until_somebody_uses_it_again():
    ledger = Ledger(8)
    ledger.came([1, 2])
    ledger.went([1])
    assert ledger.here([1, 2, 7]) == [2]
    ledger.came([1])
    assert ledger.n_here == 2


def test_numbers_that_are_no_blocks_are_passed_over():
    ledger = Ledger(4)
    ledger.came([-1, 99])
    assert ledger.n_here == 0
    assert ledger.free([(99, True)]) == Free([], [], [])


@given(st.lists(st.tuples(st.sampled_from(["came", "went"]), st.sets(st.integers(0, 15)))))
def test_the_ledger_is_a_set_of_blocks(steps):
    ledger, here = Ledger(16), set()
    for what, blocks in steps:
        getattr(ledger, what)(blocks)
        here = here | blocks if what == "came" else here - blocks
    free = ledger.free([(block, block % 2 == 0) for block in range(16)])
    assert set(free.cached) | set(free.bare) == here
    assert not set(free.parked) & here


@given(st.integers(0, 20), st.integers(0, 10_000), st.integers(1, 999))
def test_the_first_blocks_make_the_bytes_and_no_block_more(n, n_bytes, block_bytes):
    chosen = first_bytes(list(range(n)), n_bytes, block_bytes)
    assert chosen == list(range(len(chosen)))
    assert len(chosen) * block_bytes < n_bytes + block_bytes
    assert len(chosen) == n or len(chosen) * block_bytes >= n_bytes


def view(shape, strides, offset=0, item_bytes=2, mapping=0):
    return View(mapping, offset, shape, strides, item_bytes)


def test_layers_one_after_the_other():
    """vLLM on a CPU: each layer a region of its own, K and V of a block together."""
    shape, strides = (4, 2, 16, 8), (512, 256, 16, 2)
    layout = layout_of([view(shape, strides), view(shape, strides, offset=4 * 512)], 4)
    assert layout.block_bytes == 1024
    assert layout.parts([1]) == {0: [(512, 1024), (2560, 3072)]}
    assert layout.parts([0, 1, 3]) == {0: [(0, 1024), (1536, 3072), (3584, 4096)]}


def test_all_layers_of_a_block_together():
    shape, strides = (4, 16, 8), (1024, 16, 2)
    layout = layout_of([view(shape, strides), view(shape, strides, offset=256)], 4)
    assert layout.parts([2]) == {0: [(2048, 2560)]}


def test_keys_and_values_apart():
    """K and V in front of the blocks: two pieces a block."""
    layout = layout_of([view((2, 4, 16, 8), (1024, 256, 16, 2))], 4)
    assert layout.parts([3]) == {0: [(768, 1024), (1792, 2048)]}


def test_a_block_of_several_of_the_kernel():
    layout = layout_of([view((8, 4, 8), (64, 16, 2))], 4)
    assert layout.parts([1]) == {0: [(128, 256)]}


@pytest.mark.parametrize(
    ("views", "why"),
    [
        ([], "no tensor"),
        ([view((3, 5), (10, 2))], "no dimension of 4 blocks"),
        ([view((16, 4, 8), (64, 4, 8))], "do not lie together"),
        ([view((4, 16), (64, 2)), view((4, 8), (32, 2))], "different distances"),
    ],
)
def test_what_can_not_be_parked_says_why(views, why):
    with pytest.raises(LayoutError, match=why):
        layout_of(views, 4)


@given(st.sets(st.integers(0, 15)), st.integers(1, 4), st.integers(1, 64))
def test_parts_are_just_the_bytes_of_the_blocks(blocks, layers, n_bytes):
    layout = Layout([Run(0, layer * 16 * n_bytes, n_bytes, n_bytes) for layer in range(layers)], 16)
    told = {byte for start, stop in layout.parts(blocks)[0] for byte in range(start, stop)}
    assert told == {
        (layer * 16 + block) * n_bytes + i
        for layer in range(layers)
        for block in blocks
        for i in range(n_bytes)
    }
