"""Traces: written, read back the same, refused by line where they are broken."""

from __future__ import annotations

import gzip

import pytest
from hypothesis import given
from hypothesis import strategies as st

from psi_kv_governor.errors import BadInputError, SourceLostError
from psi_kv_governor.pressure import trace
from psi_kv_governor.pressure.reading import MACHINE, Level, Reading, one_level
from psi_kv_governor.pressure.trace import TraceSource, read_lines, read_trace, write_trace

SHARES = st.floats(0, 1)
BYTES = st.none() | st.integers(0, 2**62)
HEADER = '{"psi_kv_trace":2}\n'
GOOD = '{"reading":{"time_s":1.0,"interval_s":0.5,"some":0.1,"full":0.0}}\n'


NEW_HEADER = '{"psi_kv_trace":3}\n'
NEW = '{"reading":{"time_s":1.0,"interval_s":0.5,"levels":[{"name":"machine","some":0.1}]}}\n'


def readings():
    level = st.builds(
        Level,
        name=st.text(),
        some=st.none() | SHARES,
        full=st.none() | SHARES,
        headroom_bytes=BYTES,
        limit_bytes=BYTES,
        bites=st.none() | st.booleans(),
    )
    reading = st.builds(
        Reading,
        time_s=st.floats(0, 1e9),
        interval_s=st.floats(0, 100),
        levels=st.lists(level, max_size=3).map(tuple),
        source=st.text(),
    )
    return st.lists(reading, max_size=5).map(lambda found: sorted(found, key=lambda one: one.time_s))


def test_a_trace_of_the_first_edition_has_its_one_level(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text(
        HEADER + GOOD.replace("}}", ',"headroom_bytes":5,"limit_bytes":9,"own":0.5,"source":"x"}}')
    )
    level = Level(name=MACHINE, some=0.1, full=0.0, headroom_bytes=5, limit_bytes=9)
    (reading,) = read_trace(path)
    assert reading == Reading(time_s=1.0, interval_s=0.5, levels=(level,), own=0.5, source="x")
    assert (reading.some, reading.full, reading.headroom_bytes, reading.limit_bytes) == (0.1, 0.0, 5, 9)


@given(readings())
def test_what_is_written_is_read_back_the_same(tmp_path_factory, written):
    path = tmp_path_factory.mktemp("trace") / "t.jsonl"
    write_trace(path, written)
    assert read_trace(path) == written
    assert [entry.name for entry in path.parent.iterdir()] == ["t.jsonl"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "line 1 .* not the header"),
        ("hello\n", "line 1 .* not the header"),
        (GOOD, "line 1 .* not the header"),
        ('{"psi_kv_trace":1}\n', "version 1 .* not known"),
        ('{"psi_kv_trace":4}\n', "version 4 .* not known"),
        ('{"psi_kv_trace":2,"colour":1}\n', "line 1 .*colour"),
        (HEADER + GOOD + '{"reading":{"time_s":2\n', "line 3 .* broken"),
        (HEADER + GOOD + "\n" + GOOD, "line 3 .* broken"),
        (HEADER + '{"reading":{"time_s":1.0}}\n', "line 2 .* broken.*interval_s"),
        (HEADER + GOOD.replace("0.1", '"high"'), "line 2 .* broken"),
        (HEADER + GOOD.replace("0.1", "1.5"), "line 2 .* some = 1.5"),
        (HEADER + GOOD.replace("0.1", "NaN"), "line 2 .* broken"),
        (HEADER + GOOD.replace("0.5", "-1"), "line 2 .* interval_s"),
        (HEADER + GOOD + GOOD.replace("1.0", "0.5"), "line 3 .* goes back"),
        (HEADER + GOOD.replace("}}", ',"headroom_bytes":-1}}'), "line 2 .* headroom_bytes"),
        (NEW_HEADER + NEW + NEW.replace("0.1", "1.5"), "line 3 .* some = 1.5"),
        (NEW_HEADER + NEW.replace('"some"', '"limit_bytes":-1,"some"'), "line 2 .* limit_bytes"),
        (NEW_HEADER + NEW.replace("machine", "m").replace('"name":"m",', ""), "line 2 .* broken.*name"),
    ],
)
def test_a_broken_trace_names_the_line(tmp_path, text, message):
    path = tmp_path / "t.jsonl"
    path.write_text(text)
    with pytest.raises(BadInputError, match=message) as caught:
        read_trace(path)
    assert "\n" not in str(caught.value)


@given(st.binary())
def test_any_bytes_give_readings_or_bad_input(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("trace") / "t.jsonl"
    path.write_bytes(HEADER.encode() + data)
    try:
        found = read_trace(path)
    except BadInputError:
        return
    assert len(found) == data.count(b"\n")  # what comes after the last one was cut off


def test_a_line_that_was_cut_off_is_left_out_and_noted(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text(HEADER + GOOD + GOOD[:-20])
    assert len(read_trace(path)) == 1
    assert "cut off" in read_lines(path).note


def test_a_gzip_file_is_unpacked_up_to_a_limit(tmp_path, monkeypatch):
    path = tmp_path / "t.jsonl.gz"
    path.write_bytes(gzip.compress((HEADER + GOOD * 1000).encode()))
    assert len(read_trace(path)) == 1000
    monkeypatch.setattr(trace, "MOST_BYTES", 20_000)
    with pytest.raises(BadInputError, match="give a shorter one"):
        read_trace(path)
    path.write_bytes(b"\x1f\x8b" + b"nonsense" * 9)
    with pytest.raises(BadInputError, match="cannot unpack"):
        read_trace(path)


def test_a_missing_trace_and_a_folder_in_the_way_are_bad_input(tmp_path):
    with pytest.raises(BadInputError, match="No such file"):
        read_trace(tmp_path / "none")
    with pytest.raises(BadInputError, match="cannot write"):
        write_trace(tmp_path / "none" / "t.jsonl", [])


def test_a_trace_is_replayed_once_and_then_lost(tmp_path):
    written = [
        one_level(time_s=float(time_s), interval_s=1.0, some=0.2, full=0.0, source="here")
        for time_s in range(3)
    ]
    path = tmp_path / "t.jsonl"
    write_trace(path, written)
    for source in (TraceSource(written), TraceSource(path)):
        assert [source.read() for _ in written] == written
        with pytest.raises(SourceLostError, match="is over"):
            source.read()
        source.close()
        source.close()
