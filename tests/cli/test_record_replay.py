"""`record` and `replay`: the same decisions again, or those of other settings on a simulated cache."""

from __future__ import annotations

import gzip
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from cli_help import assert_refused
from evening import as_json, evening, invoke

import psi_kv_governor
from psi_kv_governor.cli import record
from psi_kv_governor.control import Action
from psi_kv_governor.recording import read_recording
from psi_kv_governor.simulation.playback import first_difference
from waiting import until

pytestmark = pytest.mark.usefixtures("own_folder")
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(psi_kv_governor.__file__).parents[1])}


# -- record ------------------------------------------------------------------------------------------------


def test_this_machine_is_recorded_and_replays_byte_for_byte(tmp_path, monkeypatch):
    def with_a_turn(recorder, count, seconds):  # the second may be over before the governor's thread began
        watch(recorder, count, seconds)
        until(lambda: count.turns)

    watch = record.watch
    monkeypatch.setattr(record, "watch", with_a_turn)
    path = tmp_path / "now.jsonl"
    made = invoke("record", str(path), "--seconds", "1", "--cells", "512", "--json")
    assert made.exit_code == 0, made.output
    report = json.loads(made.stdout)
    recording = read_recording(path)
    assert report["turns"] == len(recording.turns) > 0
    assert recording.turns[0].cache.live_bytes == 512 * 23_040
    assert path.stat().st_mode & 0o777 == 0o600
    again = invoke("replay", str(path))
    assert again.exit_code == 0
    assert f"All {len(recording.turns)} decisions are the same, byte for byte." in again.stdout


def test_without_a_turn_there_is_no_file_and_that_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(record.Governor, "start", lambda governor: None)
    path = tmp_path / "now.jsonl"
    refused = invoke("record", str(path), "--seconds", "0.1")
    assert refused.exit_code == 1
    assert "no turn came" in refused.stderr.splitlines()[-1]
    assert not path.exists()


def test_a_recording_can_be_simulated_too(recorded):
    result = invoke("simulate", "--trace", str(recorded), "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["scenarios"][0]["trims"] > 0


def test_an_existing_file_is_not_overwritten(tmp_path):
    path = tmp_path / "precious"
    path.write_text("precious")
    refused = invoke("record", str(path), "--seconds", "1")
    assert refused.exit_code == 2
    assert "is there already: give another name" in refused.stderr
    assert path.read_text() == "precious"


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 0), (signal.SIGTERM, 143)])
def test_a_signal_ends_a_recording_that_is_whole(tmp_path, number, status):
    path = tmp_path / "now.jsonl"
    command = [sys.executable, "-m", "psi_kv_governor.cli", "record", str(path)]
    process = subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    until(lambda: path.exists() and path.read_bytes().count(b"\n") > 3, "nothing is recorded")
    process.send_signal(number)
    _, said = process.communicate(timeout=600)
    assert process.returncode == status
    assert "Traceback" not in said
    recording = read_recording(path)
    assert recording.note == ""
    assert first_difference(recording.config, recording.turns) is None


@pytest.mark.llama
def test_a_governed_run_is_recorded_from_its_first_turn_on(shallow_model, tmp_path):
    path = tmp_path / "run.jsonl"
    arguments = [
        "run",
        "-m",
        str(shallow_model),
        "-c",
        "512",
        "-n",
        "48",
        "-t",
        "1",
        "--record",
        str(path),
        "Hi",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "psi_kv_governor.cli", *arguments],
        env=ENVIRONMENT,
        capture_output=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    recording = read_recording(path)
    assert recording.turns[0].reading.interval_s == 0.0  # the source's first
    seen = [turn.cache for turn in recording.turns if turn.cache.live_bytes]
    assert all(cache.step_bytes % 4608 == 0 for cache in seen)  # the real engine's
    assert first_difference(recording.config, recording.turns) is None


# -- replay ------------------------------------------------------------------------------------------------


def test_the_summary_counts_what_was_done(recorded):
    report = as_json(str(recorded))
    turns = evening()
    trims = [turn for turn in turns if turn.decision.action is Action.TRIM]
    (run,) = report["runs"].values()
    assert report["same"] is True
    assert report["turns"] == len(turns)
    assert run["trims"] == len(trims) > 0
    assert run["bytes_given_up"] == sum(turn.decision.n_bytes for turn in trims)
    assert 0 < run["bytes_restored"] <= run["bytes_given_up"]
    assert run["onset_s"] == 3.0
    assert run["onset_to_trim_s"] <= 0.5
    assert run["restores"] > 0
    assert run["direction_changes"] == 1
    assert run["min_live_share"] < 0.7
    assert sum(run["mode_s"].values()) == pytest.approx(14.9, abs=0.01)


def test_a_packed_recording_replays(recorded, tmp_path):
    packed = tmp_path / "evening.jsonl.gz"
    packed.write_bytes(gzip.compress(recorded.read_bytes()))
    assert as_json(str(packed))["same"] is True


def test_a_decision_that_the_law_would_not_make_is_shown(recorded):
    lines = recorded.read_text().splitlines(keepends=True)
    changed = json.loads(lines[40])
    changed["decision"]["n_bytes"] += 1
    lines[40] = json.dumps(changed) + "\n"
    recorded.write_text("".join(lines))
    result = invoke("replay", str(recorded))
    assert result.exit_code == 1
    assert "Turn 40 (line 41) is decided otherwise" in result.stdout
    difference = as_json(str(recorded), status=1)["difference"]
    assert difference["turn"] == 40
    assert difference["recorded"]["n_bytes"] == difference["replayed"]["n_bytes"] + 1


def test_a_recording_that_was_cut_replays_with_a_note(recorded):
    recorded.write_bytes(recorded.read_bytes()[:-30])
    result = invoke("replay", str(recorded))
    assert result.exit_code == 0
    assert f"All {len(evening()) - 1} decisions" in result.stdout
    assert "was cut off" in result.stderr


# -- what they refuse --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (["replay", "none.jsonl"], "cannot read the trace none.jsonl"),
        (["replay", "evening.jsonl", "--what-if", "hihg=0.2"], "did you mean high?"),
        (["replay", "evening.jsonl", "--what-if", "high"], "give KEY=VALUE"),
        (["replay", "evening.jsonl", "--what-if", "high=2"], "is not usable"),
        (["replay", "evening.jsonl", "--what-if", "policy=windw"], "did you mean window?"),
        (["replay", "evening.jsonl", "--config", "none.toml"], "cannot read the configuration"),
        (["replay", "other.jsonl"], "version 9 of the trace is not known"),
        (["record", "x.jsonl", "--seconds", "0"], "--seconds"),
        (["record", "x.jsonl", "--seconds", "nan"], "--seconds"),
        (["record", "x.jsonl", "--cells", "0"], "--cells"),
        (["record", "none/x.jsonl", "--seconds", "1"], "cannot record to none/x.jsonl"),
        (["record", "x.jsonl", "--config", "none.toml"], "cannot read the configuration"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_gives_one_clear_line(recorded, tmp_path, args, told):
    (tmp_path / "other.jsonl").write_text('{"psi_kv_trace":9,"mood":"good"}\n')
    assert_refused(invoke(*args), told)
    assert not (tmp_path / "x.jsonl").exists()
