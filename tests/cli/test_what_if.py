"""`replay --what-if`: the decisions of other settings on a simulated cache."""

from __future__ import annotations

from itertools import cycle

import msgspec
import pytest
from evening import CONFIG, LIMIT_BYTES, as_json, evening
from hypothesis import given, settings
from hypothesis import strategies as st

from psi_kv_governor.control import Action
from psi_kv_governor.errors import BadInputError
from psi_kv_governor.recording import read_recording
from psi_kv_governor.simulation.playback import account, play

pytestmark = pytest.mark.usefixtures("own_folder")


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


@settings(max_examples=50)
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
