"""Who never saw the code adds an engine, a source of pressure, a command and a scene: each in the one place.

CONTRIBUTING names the places. A policy is in test_examples.py, as it needs a model.
"""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

import psikv_bench.scenes
from psi_kv_governor import Governor, GovernorConfig
from psi_kv_governor.cli._group import LazyGroup
from psi_kv_governor.engines import engines
from psi_kv_governor.events import SourceChanged
from psi_kv_governor.residence import find_place
from psikv_bench import cli as bench_cli

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"


@pytest.fixture
def examples(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)


@pytest.fixture
def rows_engine(examples, monkeypatch, tmp_path):
    """The module of the engine, as its package's entry point finds it."""
    info = tmp_path / "rows_engine-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: rows-engine\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[psi_kv_governor.engines]\nrows = own_engine\n")
    monkeypatch.syspath_prepend(tmp_path)
    return engines()["rows"].load()


def quiet(engine, source) -> Governor:
    # Nothing comes back by itself: what is parked by hand is looked at, however late.
    return Governor(engine, source=source, config=GovernorConfig(status_socket=False, quiet_s=36000.0))


def test_the_example_engine_gives_memory_back_under_pressure_and_keeps_every_row():
    done = subprocess.run(
        [sys.executable, EXAMPLES / "own_engine.py"], capture_output=True, text=True, timeout=800, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    calm, pressed, same = (line.split() for line in done.stdout.splitlines())
    assert int(calm[-2]) == 48
    assert int(pressed[-2]) <= 40
    assert same[-1] == "True"
    assert len((EXAMPLES / "own_engine.py").read_text().splitlines()) < 150


def test_an_engine_of_another_package_is_found_and_led_by_hand(rows_engine, monkeypatch, tmp_path):
    found = find_place()
    if found.place is None:
        pytest.skip(f"there is no place to park: {found.why_none}")
    (tmp_path / "free").write_text(f"{8 << 30} {16 << 30}")
    engine = rows_engine.RowsEngine(found.place)
    rows = engine.open(1024)
    rows.append(np.full((512, rows_engine.ROW_BYTES), 7, dtype=np.uint8))
    source = importlib.import_module("own_source").FreeBytes(tmp_path / "free")
    with quiet(engine, source) as governor:
        parked = governor.park(0)
        assert parked.bytes_returned == 512 * rows_engine.ROW_BYTES
        assert governor.status().caches[0].sequences[0].parked_bytes == parked.bytes_returned
        assert governor.unpark().bytes_back == parked.bytes_returned
        monkeypatch.setattr(rows_engine, "IDLE_S", 3600.0)  # in use from now on
        assert rows_engine.WHY_NO_MASK.split()[0] in governor.trim(1.0).problem
    assert (rows.array[:512] == 7).all()
    assert not rows.array[512:].any()


def test_a_source_of_one_s_own_is_read_and_another_is_taken_where_it_is_lost(rows_engine, examples, tmp_path):
    file = tmp_path / "free"
    file.write_text(f"{3 << 20} {16 << 20}")
    source = importlib.import_module("own_source").FreeBytes(file)
    governor = quiet(rows_engine.RowsEngine(None, "there is no disk"), source)
    events: list[object] = []
    governor.subscribe(events.append)
    governor.step()
    assert governor.status().source == source.name
    assert governor.status().headroom_bytes == 3 << 20
    file.unlink()
    governor.step()
    governor.close()
    assert any(isinstance(event, SourceChanged) and "can't be read" in event.why for event in events)


def test_a_source_that_is_told_anew_while_it_is_read_is_never_lost(examples, tmp_path):
    own_source, file = importlib.import_module("own_source"), tmp_path / "free"
    own_source.tell_free_bytes(file, 0, 1 << 30)
    source, over = own_source.FreeBytes(file), threading.Event()

    def tell() -> None:
        for number in range(3000):
            own_source.tell_free_bytes(file, number, 1 << 30)
        over.set()

    teller = threading.Thread(target=tell)
    teller.start()
    while not over.is_set():
        assert source.read().limit_bytes == 1 << 30
    teller.join()
    assert source.read().headroom_bytes == 2999


def test_a_command_is_one_file_and_one_line(monkeypatch, tmp_path):
    package = tmp_path / "stranger_commands"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "hello.py").write_text(
        'import click\n\n@click.command("hello")\ndef command() -> None:\n    """Greet."""\n'
        '    click.echo("hello")\n'
    )
    monkeypatch.syspath_prepend(tmp_path)
    group = LazyGroup("stranger_commands", {"hello": "Greet."}, name="psi-kv")
    assert "hello  Greet." in CliRunner().invoke(group, ["--help"]).output
    assert CliRunner().invoke(group, ["hello"], standalone_mode=False).output == "hello\n"


SCENE = '''
from typing import Annotated

from msgspec import Meta

from psikv_bench.figures import Asked, figure
from psikv_bench.options import Options
from psikv_bench.record import Recorder, Report
from psikv_bench.scene import Scene


class HeadOptions(Options, frozen=True, kw_only=True):
    """How much is read."""

    repeats: Annotated[int, Meta(ge=1, description="How often.")] = 3


def run(recorder: Recorder[HeadOptions]) -> Report:
    heads = [open(recorder.options.model, "rb").read(4) for _ in range(recorder.options.repeats)]
    shares = [float(head == b"GGUF") for head in heads]
    return recorder.save(recorder.report([figure("right heads", "x", shares, Asked(">=", 1.0, "min"))], [1]))


SCENE = Scene("Reads the head of a model.", HeadOptions(), HeadOptions(repeats=1), run)
'''


@pytest.mark.llama
def test_a_scene_is_one_file_and_one_line(demo_model, monkeypatch, tmp_path):
    (tmp_path / "head.py").write_text(SCENE)
    monkeypatch.setattr(psikv_bench.scenes, "__path__", [*psikv_bench.scenes.__path__, str(tmp_path)])
    monkeypatch.setitem(bench_cli.SCENES, "head", "Reads the head of a model.")
    said = CliRunner().invoke(bench_cli.command, ["head", "--repeats", "2", "--json"], standalone_mode=False)
    assert said.exception is None, said.output
    (measured,) = json.loads(said.stdout)["figures"]
    assert measured["values"] == [1.0, 1.0]
    assert "--repeats" in CliRunner().invoke(bench_cli.command, ["head", "--help"]).output
