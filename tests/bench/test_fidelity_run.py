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
from psikv_bench.fidelity.plan import PARTS, FidelityOptions
from psikv_bench.fidelity.results import Rows
from psikv_bench.fidelity.weights import weights
from psikv_bench.journal import encoded
from psikv_bench.record import RESULT, Recorder, Report
from psikv_bench.scenes.fidelity import recorded, run

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
def kept(senseless: Path, tmp_path_factory) -> Path:
    """A folder with a report of all parts but the chats."""
    folder = tmp_path_factory.mktemp("kept")
    small(senseless, folder, only=tuple(name for name in PARTS if name != "chats"))
    return folder


@pytest.fixture(scope="module")
def rows(kept: Path) -> Rows:
    found = recorded(kept)
    assert found is not None
    return found


def test_every_part_is_measured(rows):
    for found in (rows.likelihood, rows.gradual, rows.tasks, rows.spikes):
        assert found
    assert rows.speed
    assert rows.noise


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
    assert rows.trims_between_exact == 5  # window, attention, random under two seeds, and one cell
    assert rows.differing_logits == 0
    assert all(spike.differing_logits == 0 for spike in rows.spikes)
    assert all(spike.same_after_restore == spike.tokens for spike in rows.spikes)


def test_a_task_that_the_model_can_not_do_is_said_and_not_asked_of_a_trimmed_cache(rows):
    assert not any(task.able for task in rows.tasks)  # random weights know no answer
    assert rows.retrieval == []


def test_report_plots_and_json_are_kept(kept):
    written = {path.name for path in kept.iterdir()}
    assert written == {RESULT, "summary.md", "distributions.png", "texts.png"}
    text = (kept / "summary.md").read_text()
    assert all(f"({name})" in text for name in written if name.endswith(".png"))
    assert "beyond this model" in text
    assert str(kept) not in text


def test_weights_are_taken_to_f32_for_as_long_as_they_are_read(shallow_model):
    with weights(shallow_model, "f32") as path:
        tensors = GGUFReader(path).tensors
        assert {one.name for one in tensors} == {one.name for one in GGUFReader(shallow_model).tensors}
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
    cut = small(senseless, tmp_path, Interrupt("spike:"), texts=("syntax", "reference"))
    assert cut.interrupted
    assert {line.text for line in cut.rows.likelihood} == {"", "syntax", "reference"}
    assert cut.rows.spikes == []
    again = Interrupt("facts:")
    further = small(senseless, tmp_path, again, resume=True, texts=("syntax", "reference"))
    assert not any(doing.startswith(("texts:", "steps:", "noise:")) for doing in again.seen)
    assert further.rows.likelihood == cut.rows.likelihood
    assert further.rows.spikes
    with pytest.raises(BadInputError, match="other options"):
        small(senseless, tmp_path, resume=True, texts=("syntax", "reference"), seed=1)


def test_a_chat_that_does_not_fit_is_said(senseless):
    with pytest.raises(BadInputError, match="the chat takes"):  # this model's tokens are bytes
        small(senseless, only=("chats",))


# -- one part alone ----------------------------------------------------------------------------------------


def copied(kept: Path, folder: Path) -> Path:
    (folder / RESULT).write_bytes((kept / RESULT).read_bytes())
    return folder


def test_a_part_measured_alone_takes_its_place_in_the_report(kept, rows, senseless, tmp_path):
    copied(kept, tmp_path)
    small(senseless, tmp_path, only=("speed",), policies=(), shares=(), ctx=())
    merged = recorded(tmp_path)
    assert merged is not None
    assert merged.speed != rows.speed
    assert merged.added["speed"].bench == "fidelity"
    unchanged = ("likelihood", "gradual", "tasks", "spikes", "setting")
    assert all(getattr(merged, name) == getattr(rows, name) for name in unchanged)
    assert "*speed* was measured later" in (tmp_path / "summary.md").read_text()


def test_a_report_of_another_setting_is_not_mixed_with(kept, senseless, tmp_path):
    with pytest.raises(BadInputError, match="of other seed"):
        small(senseless, copied(kept, tmp_path), seed=7, only=("speed",))


def test_a_file_that_is_no_report_is_refused(tmp_path):
    (tmp_path / RESULT).write_text("{}")
    with pytest.raises(BadInputError, match="no report of this benchmark"):
        recorded(tmp_path)


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
        (("--only", "speeds"), "did you mean speed"),
        (("--cache", "q4_0", "--policies", "keydiff"), "keydiff can't be used with this cache"),
        (("--ctx", "100000"), "beyond this model's"),
        (("--model", "missing.gguf"), "missing.gguf"),
        (("--out-dir", "/proc/nowhere"), "/proc/nowhere"),
        (("--weights", "f64"), "--weights f64"),
    ],
)
def test_bad_input_is_one_line_and_status_two(demo_model, arguments, words):
    del demo_model  # which is what is measured unless another is named
    ended = bench("--weights", "file", *arguments)
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
    assert {task.name: task.able for task in sensible.tasks}["needle"]
    kept = {(line.when, line.policy): line.all for line in sensible.retrieval if line.task == "needle"}
    assert set(kept) == {(when, policy) for when in ("known", "later") for policy in ("window", "random")}
    assert kept["known", "window"].mean < 1.0
    assert msgspec.json.decode(encoded(sensible), type=Rows) == sensible


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_governor_itself_gave_up_what_was_asked_in_the_chats(shallow_model):
    report = small(shallow_model, policies=("window",), shares=(0.5,), ctx=(896,), only=("chats",))
    full, *trimmed = report.rows.conversation
    assert (full.policy, full.trims, full.given_up) == ("full", 0.0, 0.0)
    assert {chat.policy for chat in trimmed} == {"window", "random"}
    for chat in trimmed:
        assert chat.trims > 0
        assert chat.given_up >= 0.45
