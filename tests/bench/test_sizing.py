"""Sizes of cgroups and loads."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from psi_kv_governor.config import GovernorConfig
from psi_kv_governor.errors import BadInputError
from psikv_bench.scenes.capacity import auto_limits
from psikv_bench.trials.sizing import (
    KILL_BYTES,
    NEIGHBOUR_BYTES,
    Need,
    Sizes,
    _nameless,
    deadly,
    kill_excess,
    mild,
    trimmed_bytes,
)

MIB = 1 << 20

CONFIG = GovernorConfig()
NEEDS = st.builds(
    Need,
    hard_bytes=st.integers(50 * MIB, 8000 * MIB),
    weights_bytes=st.integers(0, 4000 * MIB),
    cell_bytes=st.integers(1 << 14, 1 << 18),
    context_tokens=st.integers(1024, 100_000),
    digest=st.just("x"),
)


@given(NEEDS)
def test_a_deadly_scene_kills_a_whole_cache_and_not_a_trimmed_one(need):
    try:
        sizes = deadly(need, CONFIG, None, None)
    except BadInputError:
        assume(False)
    assert KILL_BYTES <= kill_excess(need, sizes) <= KILL_BYTES + 2 * MIB
    assert trimmed_bytes(need, CONFIG, sizes) >= 0
    assert need.hard_bytes + need.weights_bytes < (1 - 2 * CONFIG.headroom_low) * sizes.limit_bytes


@given(NEEDS)
def test_a_mild_scene_asks_for_half_of_what_may_go(need):
    assume(need.may_go_bytes(CONFIG))
    sizes = mild(need, CONFIG, None, None)
    over = need.hard_bytes + need.weights_bytes + NEIGHBOUR_BYTES + sizes.load_bytes - sizes.limit_bytes
    assert over == pytest.approx(need.may_go_bytes(CONFIG) / 2, abs=2 * MIB)


def test_what_is_given_is_kept_even_where_nobody_is_killed():
    need = Need(
        hard_bytes=100 * MIB, weights_bytes=90 * MIB, cell_bytes=23040, context_tokens=2048, digest="x"
    )
    assert deadly(need, CONFIG, 300 * MIB, 20 * MIB) == Sizes(limit_bytes=300 * MIB, load_bytes=20 * MIB)


def test_a_context_too_small_to_decide_anything_is_refused():
    need = Need(
        hard_bytes=100 * MIB, weights_bytes=90 * MIB, cell_bytes=23040, context_tokens=2048, digest="x"
    )
    with pytest.raises(BadInputError, match=r"^with a context of 2048 tokens .* give a larger --ctx$"):
        deadly(need, CONFIG, None, None)


def test_limits_around_a_model_rise():
    limits = auto_limits(163 * MIB + 5)
    assert list(limits) == sorted(set(limits))
    assert all(limit % 8 == 0 and limit > 163 for limit in limits)


def test_the_prepared_context_has_no_name_and_goes_with_the_process():
    with _nameless() as path:
        Path(path).write_bytes(b"context")
        assert Path(path).read_bytes() == b"context"
        assert os.stat(path).st_nlink == 0  # noqa: PTH116
        assert os.stat(path).st_mode & 0o077 == 0  # noqa: PTH116
    assert not Path(path).exists()
