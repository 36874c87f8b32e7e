"""The method that the governor is compared with does what it is said to do, and no more."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from psi_kv_governor.errors import BadInputError
from psikv_bench.reference import POLL_S, THRESHOLD, Cut, MiddlePruner, read_avg10

PSI = "some avg10={} avg60=0.00 avg300=0.00 total=1\nfull avg10=99.00 avg60=0.00 avg300=0.00 total=1\n"


@pytest.fixture
def pressure(tmp_path):
    """A PSI file, and a function that sets its avg10 in percent."""
    path = tmp_path / "memory.pressure"

    def set_to(percent: float) -> None:
        path.write_text(PSI.format(f"{percent:.2f}"))

    set_to(0.0)
    return path, set_to


def test_avg10_of_some_is_read_as_a_share(pressure):
    path, set_to = pressure
    set_to(12.34)
    assert read_avg10(path) == pytest.approx(0.1234)


def test_what_is_no_psi_file_is_refused(tmp_path):
    path = tmp_path / "any"
    path.write_text("full avg10=1.00 \n")
    with pytest.raises(BadInputError, match="some avg10"):
        read_avg10(path)


def test_over_the_threshold_the_middle_goes_once(pressure):
    path, set_to = pressure
    pruner = MiddlePruner(path, keep=10, tail=20, min_prune=5)
    assert pruner.look(0.0, 100) is None
    set_to(100 * THRESHOLD)
    assert pruner.look(POLL_S, 100) == Cut(10, 80)
    assert pruner.look(2 * POLL_S, 104) is None  # four tokens are fewer than it bothers about
    assert pruner.look(3 * POLL_S, 105) == Cut(80, 85)


def test_it_looks_once_a_second(pressure):
    path, set_to = pressure
    pruner = MiddlePruner(path, keep=0, tail=1, min_prune=1)
    assert pruner.look(0.0, 100) is None
    set_to(50.0)
    assert pruner.look(POLL_S - 0.01, 100) is None
    assert pruner.look(POLL_S, 100) is not None


@given(st.integers(0, 50), st.integers(1, 50), st.integers(1, 50), st.lists(st.integers(0, 30), max_size=20))
def test_first_and_last_tokens_never_go_and_none_goes_twice(tmp_path_factory, keep, tail, least, grown):
    path = tmp_path_factory.mktemp("psi") / "memory.pressure"
    path.write_text(PSI.format("90.00"))
    pruner = MiddlePruner(path, keep, tail, least)
    end, gone = 40, keep
    for number, more in enumerate(grown):
        end += more
        cut = pruner.look(number * POLL_S, end)
        if cut is not None:
            assert cut.start == gone
            assert cut.stop == end - tail
            assert cut.stop - cut.start >= least
            gone = cut.stop
