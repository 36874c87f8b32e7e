"""`watch`: what it shows of a governed process, which one, and what it says when there is none."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from rich.console import Console
from status_help import two_sequences_pressed

import psi_kv_governor
from psi_kv_governor import socket_place
from psi_kv_governor.cli import main
from psi_kv_governor.cli._watch_view import WatchView, cells_bar, sparkline
from psi_kv_governor.governor import Governor
from psi_kv_governor.socket_place import Found
from psi_kv_governor.status_messages import Update
from psi_kv_governor.status_socket import StatusSocket
from waiting import PATIENCE_S

pytestmark = pytest.mark.skipif(not socket_place.able(), reason="this platform has no Unix sockets")

PACKAGES = str(Path(psi_kv_governor.__file__).parents[1])

# A process that is governed, and under pressure until it is told to end.
GOVERNED = """
import sys
sys.path.insert(0, sys.argv[1])
from fakes import FakeSource
from psi_kv_governor.engines.simulated import SimulatedEngine
from psi_kv_governor.governor import Governor
from psi_kv_governor.status_socket import StatusSocket
engine = SimulatedEngine()
engine.add_cache(4096).sequence(0).running = True
engine.decode(3000)
governor = Governor(engine, source=FakeSource(0.6, tick_s=0.5), name="my program")
opened = StatusSocket(governor)
opened.start()
governor.step()
print(opened.path, flush=True)
sys.stdin.readline()
opened.close()
governor.close()
"""


@pytest.fixture(autouse=True)
def runtime(tmp_path, monkeypatch) -> Path:
    """A short folder of one's own that every process of a test looks in first, and no other."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    folder = tmp_path / "psi-kv"
    monkeypatch.setattr(socket_place, "folders", lambda: iter([folder]))
    for name in list(os.environ):
        if name.startswith("PSI_KV_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("PSI_KV_STATUS_SOCKET", "false")
    return folder


@pytest.fixture
def governor():
    with contextlib.closing(two_sequences_pressed()) as made:
        yield made


def watch(*args: str) -> Result:
    return CliRunner().invoke(main, ["watch", *args])


def start_governed() -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "-c", GOVERNED, str(Path(__file__).parents[1])],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": PACKAGES},
        text=True,
    )
    assert process.stdout.readline().strip().endswith(".sock")
    return process


# -- what it shows -----------------------------------------------------------------------------------------


def test_once_shows_how_it_stands(opened, governor):
    governor.step()
    result = watch("--once")
    assert result.exit_code == 0, result.output
    status = governor.status()
    assert f"{status.live_cells:,} live" in result.stdout
    assert f"{status.masked_cells:,} masked" in result.stdout
    assert "trimming" in result.stdout
    assert "gave up" in result.stdout
    assert "a fake machine" in result.stdout


def test_every_cache_and_sequence_is_shown(opened, governor):
    governor.park()
    shown = watch("--once").stdout
    assert f"simulated cache 1 of process {os.getpid()}: 4,096 cells" in shown
    assert "   0 running" in shown
    assert "   3 idle" in shown
    assert "400 live (400 parked), 0 masked" in shown
    assert "1 saved states, 5.0 MiB; 5.0 MiB of it parked" in shown


def test_json_is_an_update_a_line(opened, governor):
    governor.step()
    (line,) = watch("--json", "--once").stdout.splitlines()
    update = json.loads(line)
    assert update["status"]["mode"] == "trimming"
    assert [event["event"] for event in update["events"]] == ["CacheOpened", "ModeChanged", "Trimmed"]


def start_watching(pid: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "psi_kv_governor.cli", "watch", str(pid)]
    environment = {**os.environ, "PYTHONPATH": PACKAGES, "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment, text=True
    )


def test_it_follows_a_process_until_it_ends():
    process = start_governed()
    watcher = start_watching(process.pid)
    lines = iter(watcher.stdout.readline, "")
    assert any(line.startswith("trimming: stall 60.0%") and " live, " in line for line in lines)
    process.communicate("end\n", timeout=PATIENCE_S)
    _, err = watcher.communicate(timeout=PATIENCE_S)
    assert watcher.returncode == 0
    assert f"process {process.pid} has ended" in err


def test_ctrl_c_ends_the_view_and_not_the_process():
    process = start_governed()
    watcher = start_watching(process.pid)
    assert watcher.stdout.readline()
    watcher.send_signal(signal.SIGINT)
    _, err = watcher.communicate(timeout=PATIENCE_S)
    assert watcher.returncode == 0
    assert "Traceback" not in err
    assert process.poll() is None
    process.communicate("end\n", timeout=PATIENCE_S)
    assert process.returncode == 0


def update_of(governor: Governor) -> Update:
    return Update(time_s=7.0, status=governor.status(), events=[])


def test_the_view_is_drawn_in_a_narrow_terminal_too(governor):
    governor.step()
    view = WatchView("chat (4711)", {"high": 0.1})
    view.take(update_of(governor))
    for width in (30, 200):
        console = Console(width=width, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
        console.print(view)
        assert "chat (4711)" in console.export_text()
        console.file.close()


def test_the_curve_shows_the_most_of_each_second(governor):
    view = WatchView("x", {})
    for time_s, stall in ((1.0, 0.0), (1.2, 0.9), (1.8, 0.1), (2.1, 0.01)):
        status = governor.status()
        changed = type(status)(
            **{name: getattr(status, name) for name in status.__struct_fields__} | {"some": stall}
        )
        view.take(Update(time_s=time_s, status=changed, events=[]))
    assert sparkline(view._stall) == "▇▁"


def test_anything_that_is_away_shows_in_the_bar(governor):
    governor.step()
    governor.trim(0.5)
    running, idle = governor.status().caches[0].sequences
    assert set(cells_bar(running, 0).plain) == {"█", "▒"}
    assert set(cells_bar(idle, idle.live_cells // 2).plain) == {"█", "▓"}
    assert 15 <= len(cells_bar(running, 0).plain) <= 17


# -- which process -----------------------------------------------------------------------------------------


def test_no_governed_process_is_one_line_that_says_what_to_do():
    result = watch()
    assert result.exit_code == 1
    assert result.stdout == ""
    assert len(result.stderr.splitlines()) == 1
    assert "start one (`psi-kv chat`" in result.stderr


def test_another_pid_names_those_that_there_are(opened):
    result = watch("1")
    assert result.exit_code == 1
    assert f"1 is not a governed process of this user: there are {os.getpid()}" in result.stderr


def test_several_are_listed_unless_a_pid_is_given(opened, monkeypatch):
    both = [*socket_place.find(), Found(2**22 + 1, opened.path)]
    monkeypatch.setattr(socket_place, "find", lambda: both)
    result = watch()
    assert result.exit_code == 2
    assert [int(line.split()[0]) for line in result.stdout.splitlines()] == [os.getpid(), 2**22 + 1]
    assert "say which" in result.stderr
    listed = [json.loads(line)["pid"] for line in watch("--json").stdout.splitlines()]
    assert listed == [os.getpid(), 2**22 + 1]
    assert watch(str(os.getpid()), "--once").exit_code == 0


def test_a_process_with_two_models_is_one_process(opened, governor):
    other = StatusSocket(governor)
    other.start()
    assert len(socket_place.find()) == 2
    assert watch("--once").exit_code == 0
    other.close()


def test_a_process_of_another_version_is_told_so(opened, monkeypatch):
    monkeypatch.setattr("psi_kv_governor.status_client.VERSION", 9)
    result = watch("--once")
    assert result.exit_code == 1
    assert "another version" in result.stderr
