"""Figures, what is asked of them, and the header of a report."""

from __future__ import annotations

import re

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from psi_kv_governor.bench.record import (
    Asked,
    Options,
    Recorder,
    Report,
    check_writable,
    command_line,
    figure,
    machine,
    save,
)

from psi_kv_governor.errors import BadInputError, PsiKvError

NUMBERS = st.lists(st.floats(-1e9, 1e9), min_size=1)


@given(NUMBERS)
def test_the_median_lies_between_min_and_max_and_every_value_is_kept(values):
    found = figure("x", "s", values)
    assert found.min == min(values)
    assert found.max == max(values)
    assert found.min <= found.median <= found.max
    assert found.values == values
    assert found.passed is None


@pytest.mark.parametrize(
    ("asked", "passed"),
    [
        (Asked(">=", 2.0), True),
        (Asked(">=", 2.1), False),
        (Asked("<", 2.0), False),
        (Asked("<=", 2.0), True),
        (Asked(">=", 2.0, "min"), False),
        (Asked("<", 2.5, "max"), False),
        (Asked("<", 3.5, "max"), True),
    ],
)
def test_a_bound_holds_for_the_statistic_that_it_names(asked, passed):
    assert figure("x", "s", [3.0, 1.0, 2.0], asked).passed is passed


def test_a_figure_without_values_is_refused():
    with pytest.raises(ValueError, match="no values of x"):
        figure("x", "s", [])


@pytest.fixture
def options(tmp_path):
    model = tmp_path / "secret folder" / "model.gguf"
    model.parent.mkdir()
    model.write_bytes(b"12345")
    return Options(model=model)


def report(options, *bounds: float) -> Report:
    recorder = Recorder("trim", options, [2])
    return recorder.report([figure("x", "s", [1.0], Asked(">=", bound)) for bound in bounds])


def test_one_missed_figure_fails_the_report(options):
    found = report(options, 0.5, 1.5)
    assert not found.passed
    assert [missed.asked.bound for missed in found.missed()] == [1.5]
    assert report(options, 0.5).passed


def test_a_saved_report_reads_back_the_same(options, tmp_path):
    found = report(options, 0.5)
    path = tmp_path / "out.json"
    path.write_text("old")
    save(found, path)
    assert msgspec.json.decode(path.read_bytes(), type=Report) == found
    assert [entry.name for entry in tmp_path.iterdir() if entry.is_file()] == ["out.json"]


def test_the_report_tells_the_machine_and_no_folder(options):
    found = report(options, 0.5)
    assert found.header.model == "model.gguf"
    assert found.header.model_bytes == 5
    assert found.header.threads == [2]
    assert found.header.machine.cores >= 1
    assert re.fullmatch(r"\w+ \d+(\.\d+)+", found.header.machine.kernel)
    assert found.header.versions["numpy"]
    assert b"secret folder" not in found.to_json()


def test_the_command_line_keeps_names_and_drops_folders():
    arguments = [
        "/x/psi_kv_governor/cli/__main__.py",
        "bench",
        "trim",
        "--model",
        "/a/b.gguf",
        "--out=/c/d.json",
    ]
    assert command_line(arguments) == "psi-kv bench trim --model b.gguf --out=d.json"
    assert command_line(["benchmarks/trim.py", "--quick"]) == "trim.py --quick"


@pytest.mark.parametrize(
    ("cpuinfo", "processor"),
    [
        ("processor : 0\nmodel name : AMD EPYC\n\nprocessor : 1\nmodel name : AMD EPYC\n", "AMD EPYC"),
        (
            "processor\t: 0\nCPU part\t: 0xd0b\n\nModel\t\t: Raspberry Pi 5 Model B\n",
            "Raspberry Pi 5 Model B",
        ),
    ],
)
def test_the_processor_is_found_where_each_kind_of_board_tells_it(tmp_path, cpuinfo, processor):
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/cpuinfo").write_text(cpuinfo)
    assert machine(tmp_path).processor == processor


def test_without_proc_there_is_still_a_machine(tmp_path):
    assert machine(tmp_path).processor


@pytest.mark.parametrize("name", ["", "missing/out.json"])
def test_a_place_that_cannot_be_written_is_refused_beforehand(tmp_path, name):
    with pytest.raises(BadInputError, match="cannot write"):
        check_writable(tmp_path / name)


def test_a_report_that_cannot_be_kept_is_one_line(options, tmp_path):
    with pytest.raises(PsiKvError, match="cannot write"):
        save(report(options, 0.5), tmp_path / "gone" / "out.json")


@pytest.mark.parametrize("setting", ["threads", "repeats"])
def test_less_than_one_is_refused(options, setting):
    with pytest.raises(BadInputError, match=setting):
        msgspec.structs.replace(options, **{setting: 0})
