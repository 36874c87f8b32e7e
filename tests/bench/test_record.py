"""Figures, what is asked of them, and the header of a report."""

from __future__ import annotations

import re

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from psi_kv_governor.errors import BadInputError, PsiKvError
from psikv_bench.figures import Asked, figure
from psikv_bench.journal import Journal
from psikv_bench.machine import command_line, machine
from psikv_bench.options import Options, chosen
from psikv_bench.record import RESULT, Recorder, Report, check_folder, write

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
    return Options(model=str(model))


def report(options, *bounds: float, **given) -> Report:
    figures = [figure("x", "s", [1.0], Asked(">=", bound)) for bound in bounds]
    return Recorder("trim", options, **given).report(figures, [2])


def test_one_missed_figure_fails_the_report(options):
    found = report(options, 0.5, 1.5)
    assert not found.passed
    assert [missed.asked.bound for missed in found.missed] == [1.5]
    assert report(options, 0.5).passed


def test_a_kept_report_reads_back_the_same(options, tmp_path):
    recorder = Recorder("trim", options, folder=tmp_path / "kept")
    found = recorder.save(recorder.report([figure("x", "s", [1.0])], [1]), [{"a": 1, "b": 2}])
    read = msgspec.json.decode((tmp_path / "kept" / RESULT).read_bytes(), type=Report)
    assert (read.header, read.figures, read.notes) == (found.header, found.figures, found.notes)
    assert (tmp_path / "kept" / "trim.csv").read_text() == "a,b\n1,2\n"
    assert "x: 1 s" in (tmp_path / "kept" / "summary.md").read_text()
    assert {entry.name for entry in (tmp_path / "kept").iterdir()} == {RESULT, "summary.md", "trim.csv"}


def test_without_matplotlib_everything_but_the_plot_is_kept(options, tmp_path):
    def draw(folder):
        raise ModuleNotFoundError("no", name="matplotlib")

    recorder = Recorder("trim", options, folder=tmp_path / "kept")
    recorder.save(recorder.report([], [1]), [], draw)
    assert "no plot: matplotlib is missing" in (tmp_path / "kept" / "summary.md").read_text()


def test_the_report_names_the_machine_and_no_folder(options):
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
def test_the_processor_is_found_where_each_kind_of_board_says_it(tmp_path, cpuinfo, processor):
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/cpuinfo").write_text(cpuinfo)
    assert machine(tmp_path).processor == processor


def test_without_proc_there_is_still_a_machine(tmp_path):
    assert machine(tmp_path).processor


def test_a_folder_that_cannot_be_made_is_bad_input(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(BadInputError, match="--out-dir"):
        check_folder(tmp_path / "file" / "inside")


def test_what_cannot_be_kept_is_one_line(tmp_path):
    with pytest.raises(PsiKvError, match="cannot write"):
        write(tmp_path / "gone" / "out.json", b"")


def test_less_than_one_is_refused_by_its_option():
    with pytest.raises(BadInputError, match="--threads 0 is not usable"):
        chosen(Options(), {"threads": 0})


class Part(msgspec.Struct):
    """A finished part."""

    number: int
    values: list[float] = []


HEAD = b'{"bench":"oom"}'


class TestJournal:
    def open(self, folder, head=HEAD, go_on=False) -> Journal:
        return Journal(folder / "journal.jsonl", head, Part, go_on=go_on)

    def test_an_interrupted_run_goes_on_where_it_stopped(self, tmp_path):
        journal = self.open(tmp_path)
        journal.add(Part(number=1, values=[0.1, 1e-9]))
        journal.add(Part(number=2))
        assert self.open(tmp_path, go_on=True).parts == journal.parts

    def test_a_line_that_was_cut_by_a_crash_is_done_again(self, tmp_path):
        self.open(tmp_path).add(Part(number=1))
        with (tmp_path / "journal.jsonl").open("ab") as file:
            file.write(msgspec.json.encode(Part(number=2))[:8])
        again = self.open(tmp_path, go_on=True)
        assert [part.number for part in again.parts] == [1]
        again.add(Part(number=2))
        assert [part.number for part in self.open(tmp_path, go_on=True).parts] == [1, 2]

    def test_runs_of_other_options_are_not_mixed(self, tmp_path):
        self.open(tmp_path)
        with pytest.raises(BadInputError, match="other options"):
            self.open(tmp_path, head=b'{"bench":"latency"}', go_on=True)

    def test_a_run_that_is_there_is_not_written_over(self, tmp_path):
        self.open(tmp_path)
        with pytest.raises(BadInputError, match="--resume"):
            self.open(tmp_path)

    def test_a_damaged_line_is_named(self, tmp_path):
        self.open(tmp_path)
        with (tmp_path / "journal.jsonl").open("ab") as file:
            file.write(b"{}\n")
        with pytest.raises(BadInputError, match="line 2"):
            self.open(tmp_path, go_on=True)

    def test_resume_needs_a_folder(self, options):
        with pytest.raises(BadInputError, match="--out-dir"):
            Recorder("oom", options, resume=True)

    def test_a_report_without_its_journal_is_not_written_over_either(self, options, tmp_path):
        (tmp_path / RESULT).write_text("{}")
        with pytest.raises(BadInputError, match="holds a report"):
            Recorder("oom", options, folder=tmp_path).journal(Part, {})
