"""`watch`: what it shows of a governed process, which one, and what it says when there is none."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from rich.console import Console

import psi_kv_governor
from fakes import FakeSource
from psi_kv_governor import socket_place, status_client
from psi_kv_governor.cli import main
from psi_kv_governor.cli._watch_view import WatchView, cells_bar, sparkline
from psi_kv_governor.engines.simulated import SimulatedEngine
from psi_kv_governor.errors import PsiKvError
from psi_kv_governor.governor import Governor
from psi_kv_governor.socket_place import Found
from psi_kv_governor.status_messages import Update
from psi_kv_governor.status_socket import StatusSocket

pytestmark = [
    pytest.mark.timeout(60),
    pytest.mark.skipif(not socket_place.able(), reason="this platform has no Unix sockets"),
]

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
    engine = SimulatedEngine()
    engine.add_cache(4096).sequence(0).running = True
    engine.decode(3000)
    engine.decode(400, sequence=3)
    engine.caches[1].sequence(3).running = False
    engine.save(5 << 20)
    made = Governor(engine, source=FakeSource(0.6, tick_s=0.5), name="my program")
    yield made
    made.close()


@pytest.fixture
def opened(governor):
    made = StatusSocket(governor)
    made.start()
    yield made
    made.close()


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
    process.communicate("end\n", timeout=30)
    _, err = watcher.communicate(timeout=30)
    assert watcher.returncode == 0
    assert f"process {process.pid} has ended" in err


def test_ctrl_c_ends_the_view_and_not_the_process():
    process = start_governed()
    watcher = start_watching(process.pid)
    assert watcher.stdout.readline()
    watcher.send_signal(signal.SIGINT)
    _, err = watcher.communicate(timeout=30)
    assert watcher.returncode == 0
    assert "Traceback" not in err
    assert process.poll() is None
    process.communicate("end\n", timeout=30)
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


# -- status, limit, park and unpark ------------------------------------------------------------------------


def run(*args: str) -> Result:
    return CliRunner().invoke(main, list(args))


def test_status_shows_every_governed_process_or_one(opened, governor):
    result = run("status")
    assert result.exit_code == 0, result.output
    assert f"{os.getpid()} my program  calm: " in result.stdout
    assert "limit: none" in result.stdout
    assert "   3 idle" in result.stdout  # since when changes from one look to the next
    for called in ("my program", str(os.getpid())):
        assert f"{os.getpid()} my program  calm: " in run("status", called).stdout
    (line,) = run("status", "--json").stdout.splitlines()
    assert json.loads(line)["status"]["live_cells"] == 3400


def test_status_shows_the_others_where_one_is_of_another_version(opened, governor, monkeypatch):
    other = StatusSocket(governor)
    other.start()
    asked = status_client.told

    def told(found):
        if found.path == other.path:
            raise PsiKvError(f"process {found.pid} runs another version of this package")
        return asked(found)

    monkeypatch.setattr("psi_kv_governor.cli.status.told", told)
    result = run("status")
    other.close()
    assert result.exit_code == 0
    assert result.stdout.count("my program  calm: ") == 1
    assert "another version" in result.stderr
    assert run("status").exit_code == 0


def test_status_fails_where_nobody_can_be_understood(opened, monkeypatch):
    monkeypatch.setattr("psi_kv_governor.status_client.VERSION", 9)
    result = run("status")
    assert result.exit_code == 1
    assert "another version" in result.stderr


@pytest.mark.parametrize(
    ("amount", "share", "n_bytes"),
    [
        ("2GiB", None, 2 << 30),
        ("1.5 gib", None, 3 << 29),
        ("300M", None, 300 << 20),
        ("0.5", 0.5, None),
        ("1", 1.0, None),
        ("0", 0.0, None),
        ("none", None, None),
    ],
)
def test_a_limit_is_bytes_a_share_or_none(opened, governor, amount, share, n_bytes):
    governor.limit(0.9)
    result = run("limit", str(os.getpid()), amount)
    assert result.exit_code == 0, result.output
    assert (governor.status().limit, governor.status().limit_bytes) == (share, n_bytes)


@pytest.mark.parametrize("amount", ["2", "-1", "nan", "much", "5 apples", "", "GiB"])
def test_a_limit_that_makes_no_sense_is_refused_in_one_line(opened, governor, amount):
    result = run("limit", "--", str(os.getpid()), amount)
    assert result.exit_code == 2
    assert "is not usable: give 2GiB, a share from 0 to 1, or none" in result.stderr
    assert governor.status().limit is None


def test_park_and_unpark_say_what_they_did(opened, governor):
    parked = run("park", "my program")
    assert parked.exit_code == 0, parked.output
    assert "psi-kv park: 400 cells, 13.8 MiB returned" in parked.stdout
    assert governor.status().parked_bytes > 0
    assert "psi-kv unpark: 400 cells, 8.8 MiB back in memory" in run("unpark", "my program").stdout
    one = run("park", str(os.getpid()), "--sequence", "0")
    assert "3,000 cells" in one.stdout
    assert "there is no sequence 9: there are 0, 3" in run("park", "my program", "--sequence", "9").stdout


@pytest.mark.parametrize("args", [["limit", "nobody", "none"], ["park", "nobody"], ["status", "nobody"]])
def test_a_process_that_is_not_there_is_one_line(opened, args):
    result = run(*args)
    assert result.exit_code == 1
    assert len(result.stderr.splitlines()) == 1
    assert f"nobody is not a governed process of this user: there are {os.getpid()}" in result.stderr


def test_what_the_process_refuses_is_told(opened, governor):
    governor.engine.close()
    result = run("park", str(os.getpid()))
    assert result.exit_code == 1
    assert "the simulated engine is closed" in result.stderr
