"""`tune`: what it watches, what it writes, and that nothing that was there is lost."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

import psi_kv_governor
from psi_kv_governor.cli import main
from psi_kv_governor.cli import tune as command
from psi_kv_governor.config import GovernorConfig, load_config
from psi_kv_governor.errors import PsiKvError
from psi_kv_governor.pressure.discovery import Discovery
from psi_kv_governor.pressure.reading import Reading, one_level
from psi_kv_governor.pressure.trace import write_trace
from psi_kv_governor.sandbox import tuning_scene
from psi_kv_governor.sandbox.sandbox import Sandbox

LIMIT_BYTES = 1 << 30
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(psi_kv_governor.__file__).parents[1])}


def readings(stalls: list[float], headrooms: list[float]) -> list[Reading]:
    return [
        one_level(
            time_s=i / 50,
            interval_s=0.1,
            some=some,
            full=some,
            headroom_bytes=int(share * LIMIT_BYTES),
            limit_bytes=LIMIT_BYTES,
        )
        for i, (some, share) in enumerate(zip(stalls, headrooms, strict=True))
    ]


SCENE = readings([0.0] * 20 + [0.8] * 80, [max(0.0, 0.3 - i / 60) for i in range(100)])


class Clock:
    """Goes on only while somebody sleeps: as many readings are taken on a busy machine as on any other."""

    now_s = 1000.0
    strftime = staticmethod(time.strftime)

    def monotonic(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds


class Machine:
    """A source of which every third reading shows a stall of 15 %."""

    name = "a fake machine"
    closed = reads = 0

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def read(self) -> Reading:
        self.reads += 1
        stall = 0.15 if self.reads % 3 == 0 else 0.0
        return one_level(
            time_s=self.clock.monotonic(),
            interval_s=0.1,
            some=stall,
            full=0.0,
            headroom_bytes=LIMIT_BYTES // 2,
            limit_bytes=LIMIT_BYTES,
        )

    def close(self) -> None:
        self.closed += 1


@pytest.fixture(autouse=True)
def machine(tmp_path, monkeypatch) -> Machine:
    """A working directory of one's own, a fake machine, and scenes that are played on paper."""
    monkeypatch.chdir(tmp_path)
    for name in list(os.environ):
        if name.startswith("PSI_KV_"):
            monkeypatch.delenv(name)
    made = Machine(Clock())
    monkeypatch.setattr(command, "time", made.clock)
    monkeypatch.setattr(command, "discover", lambda: Discovery(made, []))
    monkeypatch.setattr(Sandbox, "available", lambda swap="none": (True, ""))
    monkeypatch.setattr(tuning_scene, "play", lambda with_swap, told: [SCENE])
    return made


def tune(*args: str, seconds: str = "0.4") -> Result:
    return CliRunner().invoke(main, ["tune", "--calm-s", seconds, *args])


# -- what it writes ----------------------------------------------------------------------------------------


def test_it_writes_settings_with_a_reason_each(tmp_path, machine):
    result = tune()
    assert result.exit_code == 0, result.output
    config = load_config(tmp_path / "psi-kv.toml", {})
    assert config.high == pytest.approx(0.2)
    text = (tmp_path / "psi-kv.toml").read_text()
    lines = text.splitlines()
    for number, line in enumerate(lines):
        if "=" in line and not line.startswith("#"):
            assert lines[number - 1].startswith("# ")
    assert max(map(len, lines)) <= 100
    assert "a stall of 15.0% or less" in text
    assert machine.closed == 1


def test_a_dry_run_prints_the_file_and_writes_nothing(tmp_path):
    result = tune("--dry-run")
    assert result.exit_code == 0
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "printed.toml").write_text(result.stdout)
    assert load_config(tmp_path / "printed.toml", {}).high == pytest.approx(0.2)


def test_json_has_the_proposals_and_what_they_are_worth():
    report = json.loads(tune("--dry-run", "--json").stdout)
    assert {"config", "proposals", "before", "after"} <= set(report)
    assert {"key", "value", "reason"} == set(report["proposals"][0])


def test_an_existing_file_is_refused_at_once(tmp_path, machine):
    file = tmp_path / "psi-kv.toml"
    file.write_text("high = 0.5\n")
    result = tune(seconds="1000")
    assert result.exit_code == 2
    assert "--force replaces it and keeps it as psi-kv.toml.bak" in result.stderr
    assert file.read_text() == "high = 0.5\n"


def test_force_keeps_the_old_file_and_its_other_settings(tmp_path):
    file = tmp_path / "psi-kv.toml"
    old = 'policy = "fifo"\nplace = "/some/where \\"else\\""\nhigh = 0.5\nfloor_cells = 300\n'
    file.write_text(old)
    assert tune("--force").exit_code == 0
    config = load_config(file, {})
    assert (config.policy, config.floor_cells, config.place) == ("fifo", 300, '/some/where "else"')
    assert config.high != 0.5
    assert (tmp_path / "psi-kv.toml.bak").read_text() == old
    assert tune("--force").exit_code == 0
    assert (tmp_path / "psi-kv.toml.bak").read_text() == old
    assert (tmp_path / "psi-kv.toml.bak2").exists()
    assert not [path for path in tmp_path.iterdir() if path.name.endswith(".part")]


def test_a_recording_can_stand_for_the_calm_machine(tmp_path, machine):
    path = tmp_path / "evening.jsonl"
    write_trace(path, readings([0.0, 0.4, 0.0, 0.0] * 30, [0.5] * 120))
    assert tune("--trace", str(path), "--out", "evening.toml").exit_code == 0
    assert load_config(tmp_path / "evening.toml", {}).high == pytest.approx(0.45)
    assert machine.closed == 0


# -- where less is to be had -------------------------------------------------------------------------------


def test_without_a_pen_only_the_calm_part_is_done_and_it_says_why(tmp_path, monkeypatch):
    monkeypatch.setattr(
        Sandbox, "available", lambda swap="none": (False, "no cgroup can be made: run it as root")
    )
    result = tune()
    assert result.exit_code == 0
    assert "no scene was played: no cgroup can be made: run it as root" in result.stderr
    assert "No neighbour was played" in (tmp_path / "psi-kv.toml").read_text()


def test_a_scene_that_fails_is_no_reason_to_give_up(monkeypatch):
    def fail(swap, told):
        raise PsiKvError("the sandbox may take 320 MiB and 100 MiB are available")

    monkeypatch.setattr(tuning_scene, "play", fail)
    result = tune("--dry-run")
    assert result.exit_code == 0
    assert "no scene was played: the sandbox may take 320 MiB" in result.stderr


def test_a_machine_that_tells_nothing_is_one_line(monkeypatch):
    monkeypatch.setattr(command, "discover", lambda: Discovery(None, []))
    result = tune()
    assert result.exit_code == 1
    assert "psi-kv doctor" in result.stderr


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (["--calm-s", "0"], "--calm-s"),
        (["--calm-s", "nan"], "--calm-s"),
        (["--cells", "0"], "--cells"),
        (["--trace", "none.jsonl"], "cannot read the trace none.jsonl"),
        (["--out", "no/such/folder/x.toml", "--no-scene"], "cannot write no/such/folder/x.toml"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_gives_one_clear_line(args, told):
    result = tune(*args)
    assert result.exit_code == 2
    said = [line for line in result.stderr.splitlines() if line.startswith(("psi-kv: error: ", "Error: "))]
    assert len(said) == 1
    assert told in said[0]


WATCHED = """
from psi_kv_governor.cli import main, tune
watch_calm = tune.watch_calm
def told(*given):
    print("watching", flush=True)
    return watch_calm(*given)
tune.watch_calm = told
main(["tune", "--no-scene"])
"""


def test_ctrl_c_writes_nothing(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", WATCHED],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
    )
    assert process.stdout.readline() == "watching\n"
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=600)
    assert process.returncode == 130
    assert "Traceback" not in said
    assert list(tmp_path.iterdir()) == []


# -- the real scene ----------------------------------------------------------------------------------------


@pytest.mark.swap
def test_the_scene_shows_headroom_and_stall_of_its_own_pen(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(tuning_scene, "CALM_S", 0.5)
    monkeypatch.setattr(tuning_scene, "PRESSED_S", 4.0)
    said: list[str] = []
    fast, slow = tuning_scene.play(True, said.append)
    assert len(said) == 4
    for scene in (fast, slow):
        assert scene[0].limit_bytes == tuning_scene.LIMIT_BYTES
        assert scene[0].headroom_bytes > 0.3 * tuning_scene.LIMIT_BYTES
    assert min(reading.headroom_bytes for reading in fast) < 0.1 * tuning_scene.LIMIT_BYTES
    assert max(reading.some for reading in fast) > GovernorConfig().high


@pytest.mark.cgroup
def test_without_swap_nobody_is_killed(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(tuning_scene, "CALM_S", 0.5)
    monkeypatch.setattr(tuning_scene, "PRESSED_S", 4.0)
    monkeypatch.setattr(tuning_scene, "STEPS", ((24, 0.0),))
    killed = []
    close = Sandbox.close

    def closing(sandbox: Sandbox) -> None:
        killed.append(sandbox.group.oom_kills())
        close(sandbox)

    monkeypatch.setattr(Sandbox, "close", closing)
    (fast,) = tuning_scene.play(False, lambda words: None)
    assert killed == [0]
    assert min(reading.headroom_bytes for reading in fast) < 0.25 * tuning_scene.LIMIT_BYTES
