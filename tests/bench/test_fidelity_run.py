"""The scene from end to end, small: what it finds, keeps and says, and how it is cut short and goes on.

A model with random weights runs through every part in seconds; what only sense can show is asked of the demo
model, and what only takes its words of a few of its layers.
"""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner, Result
from gguf import GGUFReader

from gguf_models import LLAMA, write_model
from psi_kv_governor.cli import main
from psi_kv_governor.errors import BadInputError
from psikv_bench.fidelity.conversation import FACTS
from psikv_bench.fidelity.plan import PARTS, FidelityOptions
from psikv_bench.fidelity.results import Rows
from psikv_bench.fidelity.retrieval import able
from psikv_bench.fidelity.subject import Subject
from psikv_bench.fidelity.weights import weights
from psikv_bench.journal import encoded
from psikv_bench.record import JOURNAL, RESULT, SUMMARY, Recorder, Report
from psikv_bench.scenes.fidelity import run

pytestmark = pytest.mark.llama


def small(
    model: Path, folder: Path | None = None, say=lambda doing, **_: None, *, resume: bool = False, **given
) -> Report:
    settings = {"policies": ("window", "attention"), "shares": (0.25,), "ctx": (640,), **given}
    options = FidelityOptions(model=str(model), threads=1, weights="file", **settings)
    return run(Recorder("fidelity", options, quick=True, folder=folder, resume=resume, say=say))


@pytest.fixture(scope="module")
def senseless(tmp_path_factory) -> Path:
    """A model of random weights, whose tokens are bytes."""
    return write_model(tmp_path_factory.mktemp("fidelity") / "senseless.gguf", LLAMA)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("kept")


@pytest.fixture(scope="module")
def rows(senseless: Path, folder: Path) -> Rows:
    """Of all parts but the chats; the report is in `folder`."""
    found: Rows = small(senseless, folder, only=tuple(name for name in PARTS if name != "chats")).rows
    return found


def test_every_part_is_measured(rows):
    for found in (rows.likelihood, rows.answers, rows.spikes):
        assert found


def test_the_full_cache_is_the_upper_bound_and_random_takes_part(rows):
    policies = {line.policy for line in rows.likelihood}
    assert {"full", "one cell", "window", "attention", "random"} == policies
    full = next(line for line in rows.likelihood if line.policy == "full")
    assert full.kl.mean == 0.0
    assert full.top1.mean == 1.0
    assert all(line.kl.mean > 0.0 for line in rows.likelihood if line.share)


def test_recall_is_measured_as_one_more_contender(senseless):
    report = small(senseless, policies=("recall",), only=("texts",))
    assert {line.policy for line in report.rows.likelihood} == {"full", "one cell", "recall", "random"}
    assert report.rows.differing_logits == 0


def test_restoring_is_exact(rows):
    assert rows.trims == 5  # window, attention, random under two seeds, and one cell
    assert rows.differing_logits == 0
    assert all(spike.differing_logits == 0 for spike in rows.spikes)
    assert all(spike.same_after_restore == spike.tokens for spike in rows.spikes)


def test_a_task_that_the_model_can_not_do_is_said_and_not_asked_of_a_trimmed_cache(rows):
    assert able(rows.answers) == frozenset()  # random weights know no answer
    assert {line.policy for line in rows.answers} == {"full"}


def test_report_plot_and_json_are_kept(rows, folder):
    assert {path.name for path in folder.iterdir()} == {RESULT, SUMMARY, JOURNAL, "distributions.png"}
    text = (folder / SUMMARY).read_text()
    assert "(distributions.png)" in text
    assert "beyond this model" in text
    assert str(folder) not in text
    assert msgspec.json.decode((folder / RESULT).read_bytes())["rows"] == msgspec.json.decode(encoded(rows))


def test_weights_are_taken_to_f32_for_as_long_as_they_are_read(wide_model):
    before = GGUFReader(wide_model).tensors
    assert {one.tensor_type.name for one in before} == {"F32", "Q8_0"}
    with weights(wide_model, "f32") as path:
        tensors = GGUFReader(path).tensors
        assert {one.name for one in tensors} == {one.name for one in before}
        assert {one.tensor_type.name for one in tensors} == {"F32"}
    assert not path.exists()


# -- cut short, and on again -------------------------------------------------------------------------------


class Interrupt:
    """Ctrl-C when the scene says something with `words`."""

    def __init__(self, words: str) -> None:
        self.words = words
        self.seen: list[str] = []

    def __call__(self, doing: str, *, new: bool = False) -> None:
        self.seen.append(doing)
        if self.words in doing:
            raise KeyboardInterrupt


def test_an_interrupted_run_keeps_its_finished_pieces_and_goes_on(senseless, tmp_path):
    two = {"texts": ("syntax", "reference"), "policies": ("window",)}
    cut = small(senseless, tmp_path, Interrupt("spike:"), **two)
    assert cut.interrupted
    assert {line.text for line in cut.rows.likelihood} == {"", "syntax", "reference"}
    assert cut.rows.spikes == []
    again = Interrupt("facts:")
    further = small(senseless, tmp_path, again, resume=True, **two)
    assert not any(doing.startswith("texts:") for doing in again.seen)
    assert further.rows.likelihood == cut.rows.likelihood
    assert further.rows.spikes
    with pytest.raises(BadInputError, match="other options"):
        small(senseless, tmp_path, resume=True, seed=1, **two)


def test_a_chat_that_does_not_fit_is_said(senseless):
    with pytest.raises(BadInputError, match="the chat takes"):  # this model's tokens are bytes
        small(senseless, only=("chats",))


def test_parts_left_out_are_measured_later_and_no_other_again(rows, folder, senseless, tmp_path):
    lines = (folder / JOURNAL).read_bytes().splitlines(keepends=True)
    (tmp_path / JOURNAL).write_bytes(b"".join(line for line in lines if b'"spike"' not in line))
    said = Interrupt("nothing")
    later = small(senseless, tmp_path, said, resume=True, only=("spike",)).rows
    assert said.seen
    assert all(doing.startswith("spike:") for doing in said.seen)
    assert later == rows


# -- the command -------------------------------------------------------------------------------------------


def bench(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["bench", "fidelity", "--quick", *arguments])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--policies", "windw"), "did you mean window"),
        (("--shares", "1.5"), "--shares"),
        (("--ctx", "512"), "too short"),
        (("--texts", "novel"), "unknown text"),
        (("--seed", "-1"), "--seed -1"),
        (("--only", "chat"), "chats"),
        (("--cache", "q4_0", "--policies", "keydiff"), "keydiff can't be used with this cache"),
        (("--ctx", "100000"), "beyond this model's"),
        (("--model", "missing.gguf"), "missing.gguf"),
        (("--out-dir", "/proc/nowhere"), "/proc/nowhere"),
        (("--weights", "f64"), "--weights"),
    ],
)
def test_bad_input_is_one_line_and_status_two(shallow_model, arguments, words):
    ended = bench("--model", str(shallow_model), "--weights", "file", *arguments)
    assert ended.exit_code == 2
    assert words in ended.output
    assert "Traceback" not in ended.output


# -- the demo model ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sensible(demo_model: Path) -> Rows:
    rows: Rows = small(demo_model, policies=("window",), shares=(0.5,), ctx=(896,), only=("facts",)).rows
    return rows


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_demo_model_finds_hidden_facts_and_loses_them_with_their_cells(sensible):
    assert "needle" in able(sensible.answers)
    lines = [line for line in sensible.answers if line.task == "needle" and line.share]
    kept = {(line.when, line.policy): line.right for line in lines}
    assert set(kept) == {(when, policy) for when in ("known", "later") for policy in ("window", "random")}
    assert kept["known", "window"].mean < 1.0
    assert msgspec.json.decode(encoded(sensible), type=Rows) == sensible


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_governor_itself_gave_up_what_was_asked_in_the_chats(shallow_model, monkeypatch):
    away: list[float] = []
    missing_share = Subject.missing_share

    def noted(subject: Subject) -> float:
        away.append(missing_share(subject))
        return away[-1]

    monkeypatch.setattr(Subject, "missing_share", noted)
    report = small(shallow_model, policies=("window",), shares=(0.5,), ctx=(896,), only=("chats",))
    assert [(line.policy, line.right.trials) for line in report.rows.answers] == [
        ("full", len(FACTS)), ("window", len(FACTS)), ("random", 2 * len(FACTS))
    ]  # fmt: skip
    assert sum(share >= 0.5 for share in away) == 3  # once a policy and seed, at the last turn
    assert away[0] == 0.0
