"""`record` and `replay`: the same decisions again, or those of other settings on a simulated cache."""

from __future__ import annotations

import gzip
import json
import os
import signal
import subprocess
import sys
import time
from itertools import cycle
from pathlib import Path

import msgspec
import pytest
from cli_help import assert_refused
from click.testing import CliRunner, Result
from hypothesis import given, settings
from hypothesis import strategies as st

import psi_kv_governor
from psi_kv_governor.cli import main
from psi_kv_governor.config import GovernorConfig
from psi_kv_governor.control import Action, Turn
from psi_kv_governor.engines.simulated import SimulatedEngine
from psi_kv_governor.errors import BadInputError
from psi_kv_governor.governor import Governor
from psi_kv_governor.pressure.reading import Reading, one_level
from psi_kv_governor.pressure.trace import TraceSource
from psi_kv_governor.recording import Recorder, read_recording
from psi_kv_governor.simulation.playback import account, first_difference, play

pytestmark = pytest.mark.usefixtures("own_folder")
CONFIG = GovernorConfig(quiet_s=2.0)
LIMIT_BYTES = 1 << 30
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(psi_kv_governor.__file__).parents[1])}


def invoke(*args: str) -> Result:
    return CliRunner().invoke(main, list(args))


def reading(i: int) -> Reading:
    pressed = 30 <= i < 70
    return one_level(
        time_s=100.0 + i / 10,
        interval_s=0.1,
        some=0.3 if pressed else 0.0,
        full=0.1 if pressed else 0.0,
        headroom_bytes=LIMIT_BYTES // 5,
        limit_bytes=LIMIT_BYTES,
    )


def evening(config: GovernorConfig = CONFIG, cells: int = 2048) -> list[Turn]:
    """A neighbour comes after 3 s, stays for 4 s and goes; the context grows meanwhile. Only stall tells."""
    now_s = 100.0
    engine = SimulatedEngine(clock=lambda: now_s)
    engine.add_cache(4096).sequence(0).running = True
    turns: list[Turn] = []
    governor = Governor(
        engine,
        source=TraceSource([reading(i) for i in range(150)]),
        config=config,
        clock=lambda: now_s,
        jitter=0.25,
    )
    governor.observe(turns.append)
    engine.decode(cells - 1)
    for i in range(150):
        now_s = reading(i).time_s
        engine.decode(1)
        governor.step()
    governor.close()
    return turns


@pytest.fixture
def recorded(tmp_path) -> Path:
    path = tmp_path / "evening.jsonl"
    recorder = Recorder(path, CONFIG)
    for turn in evening():
        recorder(turn)
    recorder.close()
    return path


def as_json(*args: str, status: int = 0) -> dict:
    result = invoke("replay", "--json", *args)
    assert result.exit_code == status, result.output
    return json.loads(result.stdout)


# -- record ------------------------------------------------------------------------------------------------


def test_this_machine_is_recorded_and_replays_byte_for_byte(tmp_path):
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
    end_s = time.monotonic() + 30
    while not (path.exists() and path.read_bytes().count(b"\n") > 3):
        assert time.monotonic() < end_s
        time.sleep(0.05)
    process.send_signal(number)
    _, said = process.communicate(timeout=30)
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
        timeout=120,
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


# -- what if -----------------------------------------------------------------------------------------------


def test_what_if_shows_other_settings_next_to_what_was_done(recorded):
    report = as_json(str(recorded), "--what-if", "high=0.5", "--what-if", "high_max=0.5")
    runs = report["runs"]
    assert report["same"] is None
    assert list(runs) == ["recorded", "played again", "what if"]
    assert runs["recorded"]["trims"] > 0
    assert runs["what if"]["trims"] == 0
    assert runs["what if"]["onset_s"] == runs["recorded"]["onset_s"]


def test_the_same_settings_on_the_simulated_cache_do_the_same(recorded):
    """The recording was made on such a cache, so what is played must be what was recorded."""
    turns = read_recording(recorded).turns
    assert play(CONFIG, turns, CONFIG) == turns


def test_what_if_gives_up_from_its_own_cache(recorded):
    """The recorded snapshots lost bytes to the recorded trims; larger ones meet what they left."""
    turns = read_recording(recorded).turns
    played = play(msgspec.structs.replace(CONFIG, step_min=0.5, step_max=0.5), turns, CONFIG)
    first = next(i for i, turn in enumerate(played) if turn.decision.action is Action.TRIM)
    assert played[first].decision.n_bytes > turns[first].decision.n_bytes
    assert played[first + 1].cache.live_bytes < turns[first + 1].cache.live_bytes
    by_time = {turn.reading.time_s: turn for turn in turns}
    for turn in played:
        recorded_turn = by_time.get(turn.reading.time_s)
        assert recorded_turn is None or turn.cache.total_bytes == recorded_turn.cache.total_bytes


def test_what_if_begins_with_what_was_away_at_first():
    turns = evening()
    after = next(i for i, turn in enumerate(turns) if turn.cache.masked_bytes)
    played = play(CONFIG, turns[after:], CONFIG)
    assert played[0].cache.masked_bytes == turns[after].cache.masked_bytes


def test_a_context_that_shrinks_is_followed():
    turns = evening()
    cell_bytes = turns[0].cache.step_bytes // CONFIG.block_cells
    short = msgspec.structs.replace(turns[0].cache, live_bytes=300 * cell_bytes)
    turns += [
        msgspec.structs.replace(
            turn, cache=short, reading=msgspec.structs.replace(turn.reading, time_s=turn.reading.time_s + 20)
        )
        for turn in turns[:20]
    ]
    assert play(CONFIG, turns, CONFIG)[-1].cache.total_bytes == 300 * cell_bytes


COUNTS = st.integers(0, 700)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(COUNTS, COUNTS, COUNTS, st.floats(0, 1), st.integers(0, LIMIT_BYTES)), min_size=1))
def test_any_context_can_be_played_and_keeps_its_length(made):
    turns = []
    for turn, (live, masked, lost, some, headroom) in zip(cycle(evening()[:100]), made, strict=False):
        size = turn.cache.step_bytes // CONFIG.block_cells
        level = msgspec.structs.replace(turn.reading.levels[0], some=some, headroom_bytes=headroom)
        turns.append(
            msgspec.structs.replace(
                turn,
                reading=msgspec.structs.replace(turn.reading, levels=(level,)),
                cache=msgspec.structs.replace(
                    turn.cache, live_bytes=live * size, masked_bytes=masked * size, lost_bytes=lost * size
                ),
            )
        )
    lengths = {turn.cache.total_bytes for turn in turns}
    assert {turn.cache.total_bytes for turn in play(CONFIG, turns, CONFIG)} <= lengths


def test_a_context_longer_than_any_is_refused():
    turn = evening()[0]
    cache = msgspec.structs.replace(turn.cache, live_bytes=1 << 50)
    with pytest.raises(BadInputError, match="can't be played"):
        play(CONFIG, [msgspec.structs.replace(turn, cache=cache)], CONFIG)


def test_a_settings_file_can_be_tried(recorded, tmp_path):
    file = tmp_path / "tuned.toml"
    file.write_text("high = 0.5\nhigh_max = 0.5\n")
    assert as_json(str(recorded), "--config", str(file))["runs"]["what if"]["trims"] == 0


def test_a_pause_of_the_machine_is_in_no_modes_time():
    turns = evening()
    late = [
        msgspec.structs.replace(
            turn, reading=msgspec.structs.replace(turn.reading, time_s=turn.reading.time_s + 3600)
        )
        for turn in turns
    ]
    assert sum(account([*turns, *late], CONFIG).mode_s.values()) == pytest.approx(2 * 14.9, abs=0.1)


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
