"""Recordings: what is written is private, whole and read back the same; anything else is refused."""

from __future__ import annotations

import errno
import gzip
import json
import os
import re

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from psi_kv_governor.config import GovernorConfig
from psi_kv_governor.control import Action, CacheSnapshot, Decision, LawState, Turn, decide
from psi_kv_governor.errors import BadInputError
from psi_kv_governor.pressure import read_trace
from psi_kv_governor.pressure.reading import MACHINE, Level, Reading, one_level
from psi_kv_governor.recording import Recorder, machine_facts, read_recording, unknown_key
from psi_kv_governor.simulation.playback import first_difference

CONFIG = GovernorConfig(high=0.2, place="/home/somebody/private")
CACHE = CacheSnapshot(
    live_bytes=94_371_840,
    masked_bytes=0,
    lost_bytes=0,
    trimmable_bytes=86_999_040,
    lossless_bytes=0,
    step_bytes=1_474_560,
)


def turns(stalls=(0.0, 0.1, 0.7, 0.0), source="/proc/pressure/memory") -> list[Turn]:
    """Turns as the loop makes them: each decision follows from the ones before."""
    state, made = LawState(), []
    for i, some in enumerate(stalls):
        reading = one_level(time_s=5.0 + i / 3, interval_s=1 / 3, some=some, full=some / 3, source=source)
        decision, state = decide(CONFIG, state, reading, CACHE, None)
        made.append(Turn(reading=reading, cache=CACHE, cache_limit=None, decision=decision))
    return made


def record(path, made, config=CONFIG):
    recorder = Recorder(path, config)
    for turn in made:
        recorder(turn)
    recorder.close()
    return recorder


@pytest.fixture
def path(tmp_path):
    return tmp_path / "evening.jsonl"


def test_what_is_recorded_is_read_back_the_same(path):
    record(path, turns())
    recording = read_recording(path)
    assert recording.turns == turns()
    assert recording.note == ""
    assert recording.config == msgspec.structs.replace(CONFIG, place="")
    assert recording.machine["cpus"] == os.cpu_count()


def test_a_recording_is_a_trace_of_its_readings_too(path):
    record(path, turns())
    assert read_trace(path) == [turn.reading for turn in turns()]


def test_a_packed_recording_is_read_as_it_is(path, tmp_path):
    record(path, turns())
    packed = tmp_path / "evening.jsonl.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    assert read_recording(packed) == read_recording(path)


def test_the_file_is_the_owners_alone_and_names_nobody(path):
    record(path, turns(source="/sys/fs/cgroup/user.slice/user-1000.slice/anna.scope/memory.pressure"))
    assert path.stat().st_mode & 0o777 == 0o600
    text = path.read_text()
    for private in (os.uname().nodename, "somebody", "anna", "user-1000"):
        assert private not in text
    assert read_recording(path).turns[0].reading.source == "…/memory.pressure"


def test_cgroups_are_numbered_and_the_decisions_replay_all_the_same(path):
    own, above = "/sys/fs/cgroup/user.slice/user-1000.slice/anna.scope", "/sys/fs/cgroup/user.slice"
    made, state = [], LawState()
    for second in range(20):
        limits = {"headroom_bytes": 1 << 20, "limit_bytes": 1 << 30, "some": 0.5, "full": 0.1}
        reading = Reading(
            time_s=float(second),
            interval_s=1.0,
            levels=(
                Level(name=own, **limits),
                Level(name=above, limit="memory.max", **{**limits, "some": 0.9}),
                Level(name=MACHINE, some=0.1),
            ),
        )
        decision, state = decide(CONFIG, state, reading, CACHE)
        made.append(Turn(reading=reading, cache=CACHE, cache_limit=None, decision=decision))
    assert any(own in turn.decision.reason or above in turn.decision.reason for turn in made)
    record(path, made)
    assert not {"anna", "user", "1000"} & set(re.split(r"\W", path.read_text()))
    recording = read_recording(path)
    assert len({level.name for level in recording.turns[0].reading.levels}) == 3
    assert first_difference(recording.config, recording.turns) is None


def test_a_file_that_is_there_is_not_overwritten(path):
    path.write_text("precious")
    with pytest.raises(BadInputError, match="is there already"):
        Recorder(path, CONFIG)
    assert path.read_text() == "precious"


def test_a_folder_that_is_not_there_is_bad_input(tmp_path):
    with pytest.raises(BadInputError, match="No such file"):
        Recorder(tmp_path / "none" / "a.jsonl", CONFIG)


def test_a_recording_without_a_turn_leaves_no_file(path):
    record(path, [])
    assert not path.exists()


def test_each_turn_is_on_the_disk_at_once(path):
    recorder = Recorder(path, CONFIG)
    for number, turn in enumerate(turns(), start=1):
        recorder(turn)
        assert len(read_recording(path).turns) == number
    recorder.close()


def test_a_full_disk_ends_the_recording_and_not_the_run(path, caplog):
    recorder = Recorder(path, CONFIG)
    recorder(turns()[0])

    class Full:
        closed = False

        def write(self, data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        def close(self):
            self.closed = True

    whole, recorder._file = recorder._file, Full()
    for turn in turns()[1:]:
        recorder(turn)
    whole.close()
    assert "No space left" in recorder.problem
    told = [record.getMessage() for record in caplog.records]  # of all threads of this process
    assert sum(recorder.problem in line for line in told) == 1
    assert len(read_recording(path).turns) == recorder.turns == 1


# -- files that were cut -----------------------------------------------------------------------------------


def test_a_killed_recorder_costs_the_last_line(path):
    record(path, turns())
    path.write_bytes(path.read_bytes()[:-30])
    recording = read_recording(path)
    assert recording.turns == turns()[:-1]
    assert "cut off" in recording.note


def test_a_packed_file_without_its_end_gives_what_there_is(path, tmp_path):
    record(path, turns([0.01 * (i % 7) for i in range(500)]))
    packed = tmp_path / "cut.gz"
    packed.write_bytes(gzip.compress(path.read_bytes())[:-400])
    recording = read_recording(packed)
    assert 10 < len(recording.turns) < 500
    assert recording.note


@given(st.integers(0, 3000), st.booleans())
def test_cut_anywhere_it_gives_turns_or_bad_input(tmp_path_factory, at, packed):
    folder = tmp_path_factory.mktemp("cut")
    record(folder / "whole", turns())
    data = (folder / "whole").read_bytes()
    data = gzip.compress(data) if packed else data
    (folder / "cut").write_bytes(data[:at])
    try:
        found = read_recording(folder / "cut")
    except BadInputError:
        return
    assert found.turns == turns()[: len(found.turns)]


@given(st.binary(max_size=300), st.booleans())
def test_any_bytes_after_the_header_give_turns_or_bad_input(tmp_path_factory, data, packed):
    path = tmp_path_factory.mktemp("any") / "a.jsonl"
    data = b'{"psi_kv_trace":3}\n' + data + b"\n"
    path.write_bytes(gzip.compress(data) if packed else data)
    with pytest.raises(BadInputError):  # random bytes are never a turn
        read_recording(path)


# -- files of another kind ---------------------------------------------------------------------------------


def edited(path, **changes):
    """The recording with its first turn changed: a dotted name and its new value."""
    record(path, turns())
    head, first, *rest = path.read_text().splitlines()
    line = json.loads(first)
    for name, value in changes.items():
        *inner, last = name.split("__")
        place = line
        for part in inner:
            place = place[part]
        place[last] = value
    path.write_text("\n".join([head, json.dumps(line), *rest, ""]))
    return path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weather": 1}, "line 2 .*'weather' is not known here"),
        ({"reading__humidity": 1}, "line 2 .*'reading.humidity'"),
        ({"cache__colour": 1}, "'cache.colour'"),
        ({"decision__mood": 1}, "'decision.mood'"),
        ({"decision__action": "dance"}, "line 2 .* broken.*dance"),
        ({"reading__levels": [{"name": "machine", "some": 1.5}]}, "line 2 .* makes no sense: some = 1.5"),
        ({"reading__levels": [{"name": "machine", "mood": 1}]}, "'reading.levels.mood'"),
        ({"cache__live_bytes": "many"}, "line 2 .* broken"),
        ({"cache__live_bytes": -1}, "line 2 .* makes no sense: live_bytes is below 0"),
    ],
)
def test_a_line_that_is_no_turn_is_named(path, changes, message):
    with pytest.raises(BadInputError, match=message):
        read_recording(edited(path, **changes))


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ('{"psi_kv_trace":9}', "version 9 .* not known"),
        ('{"psi_kv_trace":1}', "version 1 .* not known"),
        ('{"psi_kv_trace":3,"weather":"fair"}', "line 1 .*weather"),
        ('{"psi_kv_trace":3,"config":{"hihg":0.2}}', "line 1 .* hihg"),
        ('{"psi_kv_trace":3,"config":{"high":7}}', "line 1 .*high"),
        ("{}", "not the header"),
    ],
)
def test_a_header_of_another_version_or_with_other_settings_is_refused(path, header, message):
    record(path, turns())
    path.write_text("\n".join([header, *path.read_text().splitlines()[1:], ""]))
    with pytest.raises(BadInputError, match=message) as caught:
        read_recording(path)
    assert "\n" not in str(caught.value)


def test_readings_alone_are_no_recording(path):
    path.write_text('{"psi_kv_trace":3}\n{"reading":{"time_s":1.0,"interval_s":0.5}}\n')
    with pytest.raises(BadInputError, match="a reading and no decision"):
        read_recording(path)


def test_a_header_alone_is_no_recording(path):
    path.write_text('{"psi_kv_trace":3}\n')
    with pytest.raises(BadInputError, match="no turns"):
        read_recording(path)


def test_unknown_keys_are_found_at_any_depth():
    turn = msgspec.to_builtins(turns()[0])
    assert unknown_key(turn, Turn) == ""
    turn["decision"]["why"] = ""
    assert unknown_key(turn, Turn) == "decision.why"
    assert unknown_key([1], Turn) == ""


def test_the_machine_is_described_without_its_owner(tmp_path):
    proc = tmp_path / "proc"
    proc.mkdir()
    (proc / "meminfo").write_text("MemTotal:  8000000 kB\nMemAvailable:  6000000 kB\n")
    (proc / "swaps").write_text("Filename Type Size Used Priority\n/dev/zram0 partition 4000 0 100\n")
    facts = machine_facts(tmp_path)
    assert (facts["memory_bytes"], facts["swap_bytes"]) == (8000000 * 1024, 4000 * 1024)
    assert "swap_bytes" not in machine_facts(tmp_path / "none")
    assert not any("/" in str(value) for value in facts.values())


def test_a_decision_of_every_kind_survives(path):
    made = [
        msgspec.structs.replace(
            turns()[0],
            decision=Decision(action=action, n_bytes=7, mode=turns()[0].decision.mode, reason="ü\n"),
        )
        for action in Action
    ]
    record(path, made)
    assert read_recording(path).turns == made
