"""The benchmark from end to end, small: what it finds, keeps and says, and how it is cut short and goes on.

A model with random weights runs through every part in seconds; what only sense can show is asked of the demo
model.
"""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner, Result
from engine.models import LLAMA, write_model
from psi_kv_governor.bench.fidelity.keeping import JSON, TEXT, keep, recorded
from psi_kv_governor.bench.fidelity.pieces import FOLDER
from psi_kv_governor.bench.fidelity.plan import PARTS, Options
from psi_kv_governor.bench.fidelity.results import FidelityReport
from psi_kv_governor.bench.fidelity.run import run
from psi_kv_governor.bench.record import check_folder

from psi_kv_governor.cli import main
from psi_kv_governor.errors import BadInputError, PsiKvError

pytestmark = pytest.mark.llama


def small(model: Path, **given: object) -> Options:
    settings = {"quick": True, "policies": ("window", "attention"), "shares": (0.25,), "ctx": (640,)}
    return Options(model=model, threads=1, weights="file", **{**settings, **given})


@pytest.fixture(scope="module")
def senseless(tmp_path_factory) -> Path:
    """A model of random weights, whose tokens are bytes."""
    return write_model(tmp_path_factory.mktemp("fidelity") / "senseless.gguf", LLAMA)


@pytest.fixture(scope="module")
def report(senseless: Path) -> FidelityReport:
    return run(small(senseless, only=tuple(name for name in PARTS if name != "chats")))


def test_every_part_is_measured(report):
    assert not report.unfinished
    for found in (report.likelihood, report.gradual, report.tasks, report.spikes):
        assert found
    assert report.speed
    assert report.noise


def test_the_full_cache_is_the_upper_bound_and_random_takes_part(report):
    policies = {line.policy for line in report.likelihood}
    assert {"full", "one cell", "window", "attention", "random"} == policies
    full = next(line for line in report.likelihood if line.policy == "full")
    assert full.kl.mean == 0.0
    assert full.top1.mean == 1.0
    trimmed = [line for line in report.likelihood if line.share]
    assert all(line.kl.mean > 0.0 for line in trimmed)


def test_restoring_is_exact(report):
    assert report.trims_between_exact == 5  # window, attention, random under two seeds, and one cell
    assert report.differing_logits == 0
    assert all(spike.differing_logits == 0 for spike in report.spikes)
    assert all(spike.same_after_restore == spike.tokens for spike in report.spikes)


def test_a_task_that_the_model_can_not_do_is_said_and_not_asked_of_a_trimmed_cache(report):
    assert not any(task.able for task in report.tasks)  # random weights know no answer
    assert report.retrieval == []


def test_report_plots_and_json_are_kept(report, tmp_path):
    written = keep(report, tmp_path)
    assert {path.name for path in written} >= {JSON, TEXT, "distributions.png", "texts.png"}
    assert recorded(tmp_path) == report
    text = (tmp_path / TEXT).read_text()
    assert all(f"({path.name})" in text for path in written if path.suffix == ".png")
    assert "beyond this model" in text
    assert str(tmp_path) not in text


# -- cut short, and on again -------------------------------------------------------------------------------


class Interrupt:
    """Ctrl-C when the benchmark comes to `part` and has done `done` of it."""

    def __init__(self, part: str, done: int = 1) -> None:
        self.at = (part, done)
        self.seen: list[str] = []

    def __call__(self, part: str, doing: str, done: int, total: int) -> None:
        assert done <= total
        self.seen.append(doing)
        if (part, done) == self.at:
            raise KeyboardInterrupt


TWO = ("syntax", "reference")


def test_an_interrupted_run_keeps_its_finished_pieces_and_the_same_command_goes_on(senseless, tmp_path):
    asked = small(senseless, texts=TWO, only=("texts", "spike"))
    cut = run(asked, Interrupt("spike"), tmp_path)
    assert "interrupted in the part 'spike'" in cut.unfinished
    assert not cut.passed
    assert {line.text for line in cut.likelihood} == {"", *TWO}
    assert cut.spikes == []

    again = Interrupt("never")
    whole = run(asked, again, tmp_path)
    assert not any("25%" in doing and "disk" not in doing for doing in again.seen)  # no text is read anew
    assert whole.likelihood == cut.likelihood
    assert whole.header.seconds >= 0.5 * cut.header.seconds  # what was measured before counts
    assert whole.spikes
    assert not (tmp_path / FOLDER).exists()


def test_pieces_of_other_settings_are_not_mixed_in(senseless, tmp_path):
    run(small(senseless, only=("texts", "spike")), Interrupt("spike"), tmp_path)
    other = Interrupt("spike")
    run(small(senseless, only=("texts", "spike"), seed=1), other, tmp_path)
    assert any("640 tokens" in doing for doing in other.seen)


def test_a_piece_cut_off_while_it_was_written_is_measured_anew(senseless, tmp_path):
    asked = small(senseless, only=("texts", "spike"))
    run(asked, Interrupt("spike"), tmp_path)
    (piece,) = (tmp_path / FOLDER).iterdir()
    piece.write_bytes(piece.read_bytes()[:100])
    again = Interrupt("spike")
    assert run(asked, again, tmp_path).likelihood
    assert any("640 tokens" in doing for doing in again.seen)


def test_a_chat_that_does_not_fit_is_said(senseless):
    with pytest.raises(BadInputError, match="the chat takes"):  # this model's tokens are bytes
        run(small(senseless, only=("chats",)))


def test_without_a_folder_it_says_how_it_could_go_on(senseless):
    report = run(small(senseless), Interrupt("texts"))
    assert "--out-dir" in report.unfinished
    assert report.likelihood == []


# -- one part alone ----------------------------------------------------------------------------------------


def test_a_part_measured_alone_takes_its_place_in_the_report(report, senseless, tmp_path):
    keep(report, tmp_path)
    ended = bench("--only", "speed", "--threads", "1", "--model", str(senseless), "--out-dir", str(tmp_path))
    assert ended.exit_code in {0, 1}  # 1: a target is missed, which random weights may do
    merged = recorded(tmp_path)
    assert merged is not None
    assert merged.speed != report.speed
    assert merged.added["speed"].bench == "fidelity"
    unchanged = ("likelihood", "gradual", "tasks", "spikes", "header", "setting")
    assert all(getattr(merged, name) == getattr(report, name) for name in unchanged)
    assert "*speed* was measured by" in (tmp_path / TEXT).read_text()


def test_a_report_of_another_setting_is_not_mixed_with(report, senseless, tmp_path):
    keep(report, tmp_path)
    with pytest.raises(BadInputError, match="of other seed"):
        run(small(senseless, seed=7, only=("speed",)), folder=tmp_path, earlier=report)


def test_a_file_that_is_no_report_is_refused(tmp_path):
    (tmp_path / JSON).write_text("{}")
    with pytest.raises(BadInputError, match="no report of this benchmark"):
        recorded(tmp_path)


# -- the command -------------------------------------------------------------------------------------------


def bench(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["bench", "fidelity", "--quick", *arguments])


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--policies", "windw"), "did you mean window"),
        (("--shares", "1.5"), "share of 1.5"),
        (("--shares", "half"), "share of 'half'"),
        (("--ctx", "many"), "context of 'many'"),
        (("--ctx", "512"), "too short"),
        (("--texts", "novel"), "unknown text"),
        (("--seed", "-1"), "seed of -1"),
        (("--only", "speeds"), "did you mean speed"),
        (("--cache", "q4_0", "--policies", "keydiff"), "keydiff can't be used with this cache"),
        (("--ctx", "100000"), "beyond this model's"),
        (("--model", "missing.gguf"), "missing.gguf"),
        (("--out-dir", "/proc/nowhere"), "/proc/nowhere"),
    ],
)
def test_bad_input_is_one_line_and_status_two(demo_model, arguments, told):
    ended = bench("--weights", "file", *arguments)
    assert ended.exit_code == 2
    assert told in ended.output
    assert len(ended.output.strip().splitlines()) == 1


def test_a_folder_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(BadInputError, match="cannot make"):
        check_folder(tmp_path / "file")


def test_pieces_that_can_not_be_written_are_one_line(senseless, tmp_path):
    (tmp_path / FOLDER).touch()
    with pytest.raises(PsiKvError, match="cannot write"):
        run(small(senseless, only=("noise",)), folder=tmp_path)


def test_ctrl_c_ends_with_its_own_status_and_the_report(senseless, monkeypatch):
    from psi_kv_governor.bench.fidelity import likelihood

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(likelihood, "measure", interrupted)
    ended = bench("--json", "--weights", "file", "--model", str(senseless))
    assert ended.exit_code == 130
    assert "interrupted in the part 'texts'" in ended.stderr
    assert json.loads(ended.stdout)["likelihood"] == []


# -- the demo model ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sensible(demo_model: Path) -> FidelityReport:
    return run(small(demo_model, policies=("window",), shares=(0.5,), ctx=(896,), only=("facts", "chats")))


@pytest.mark.slow
def test_the_demo_model_finds_hidden_facts_and_loses_them_with_their_cells(sensible):
    assert {task.name: task.able for task in sensible.tasks}["needle"]
    kept = {(line.when, line.policy): line.all for line in sensible.retrieval if line.task == "needle"}
    assert set(kept) == {(when, policy) for when in ("known", "later") for policy in ("window", "random")}
    assert kept["known", "window"].mean < 1.0
    assert msgspec.json.decode(sensible.to_json(), type=FidelityReport) == sensible


@pytest.mark.slow
def test_the_governor_itself_gave_up_what_was_asked_in_the_chats(sensible):
    full, *trimmed = sensible.conversation
    assert (full.policy, full.trims, full.given_up) == ("full", 0.0, 0.0)
    assert {chat.policy for chat in trimmed} == {"window", "random"}
    for chat in trimmed:
        assert chat.trims > 0
        assert chat.given_up >= 0.45
