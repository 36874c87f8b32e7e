"""The command `simulate`: what it prints, that the same seed prints the same, and what it refuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from cli_help import assert_refused
from click.testing import CliRunner, Result

import psi_kv_governor
from psi_kv_governor.cli import main
from psi_kv_governor.pressure.reading import one_level
from psi_kv_governor.pressure.trace import write_trace
from psi_kv_governor.simulation import SCENARIOS
from psi_kv_governor.simulation.matrix import MATRIX

pytestmark = pytest.mark.usefixtures("own_folder")
PACKAGES = str(Path(psi_kv_governor.__file__).parents[1])


def invoke(*args: str) -> Result:
    return CliRunner().invoke(main, ["simulate", *args])


def as_json(*args: str) -> dict:
    result = invoke("--json", *args)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.fixture
def trace(tmp_path) -> Path:
    path = tmp_path / "evening.trace"
    stalls = [0.0, 0.0, 0.6, 0.6, 0.6, *[0.0] * 9]
    write_trace(
        path, [one_level(time_s=70.0 + i, interval_s=1.0, some=some) for i, some in enumerate(stalls)]
    )
    return path


def test_it_prints_a_table_for_every_scenario():
    result = invoke("--seconds", "20")
    assert result.exit_code == 0
    for name, scenario in SCENARIOS.items():
        assert f"{name}: {scenario.about}" in result.stdout
    assert result.stdout.count("direction changes") == len(SCENARIOS)
    assert "ungoverned" in result.stdout


def test_chosen_scenarios_come_in_the_order_given():
    report = as_json("--scenario", "spike", "--scenario", "calm", "--seconds", "5")
    assert [run["scenario"] for run in report["scenarios"]] == ["spike", "calm"]


def test_the_json_holds_the_figures_and_every_action():
    report = as_json("--scenario", "spike", "--seed", "3")
    (run,) = report["scenarios"]
    assert (report["seed"], report["ctx"], report["config"]["policy"]) == (3, 4096, "hybrid")
    trims = [act for act in run["acts"] if act["action"] == "trim"]
    assert len(trims) == run["trims"] > 0
    assert sum(act["cells"] for act in trims) == run["cells_given_up"]
    assert sum(act["bytes_returned"] for act in trims) == run["bytes_returned"]
    assert run["stall_s"] < run["stall_ungoverned_s"]


IN_BOTH_FORMS = """
from psi_kv_governor.cli import main
for form in ([], ["--json"]):
    main(["simulate", "--seed", "5", "--seconds", "15", *form], standalone_mode=False)
"""


def test_the_same_seed_gives_the_same_bytes_in_every_process():
    said = []
    for other in ("40", "200"):
        around = {"COLUMNS": other, "PYTHONHASHSEED": other, "FORCE_COLOR": other, "PYTHONPATH": PACKAGES}
        command = [sys.executable, "-c", IN_BOTH_FORMS]
        done = subprocess.run(
            command, env={**os.environ, **around}, capture_output=True, check=True, timeout=600
        )
        said.append(done.stdout)
    assert said[0] == said[1]
    table, as_json = said[0].split(b"{", 1)
    assert len(table) > 1000
    acts = [act for run in json.loads(b"{" + as_json)["scenarios"] for act in run["acts"]]
    assert {act["action"] for act in acts} == {"trim", "restore"}
    assert b"\x1b" not in said[0]


def test_another_seed_gives_another_output():
    assert invoke("--seed", "1", "--seconds", "20").stdout != invoke("--seed", "2", "--seconds", "20").stdout


def test_settings_come_from_option_variable_and_file(tmp_path, monkeypatch):
    file = tmp_path / "mine.toml"
    file.write_text("quiet_s = 9\nhigh = 0.5\nlow = 0.3\n")
    monkeypatch.setenv("PSI_KV_HIGH", "0.6")
    config = as_json(
        "--config",
        str(file),
        "--set",
        "low=0.2",
        "--policy",
        "window",
        "--scenario",
        "calm",
        "--seconds",
        "2",
    )["config"]
    assert (config["quiet_s"], config["high"], config["low"]) == (9.0, 0.6, 0.2)


def test_settings_change_what_happens():
    (held,) = as_json("--scenario", "sustained", "--set", "floor_share=0.9")["scenarios"]
    assert held["min_live_share"] >= 0.9


def test_the_matrix_is_a_table_in_markdown_or_json():
    table = invoke("--matrix", "--seconds", "2")
    assert table.exit_code == 0, table.output
    lines = table.stdout.splitlines()
    assert len(lines) == 2 + 2 * len(MATRIX)
    assert {line.count("|") for line in lines} == {8}
    rows = as_json("--matrix", "--seconds", "2")["machines"]
    assert [row["state"] for row in rows[:2]] == ["calm", "busy"]


# -- traces ------------------------------------------------------------------------------------------------


def test_a_recorded_trace_is_replayed(trace):
    report = as_json("--trace", str(trace))
    (run,) = report["scenarios"]
    assert (run["scenario"], run["trims"], run["restores"], report["seed"]) == ("evening.trace", 3, 1, None)
    assert run["stall_ungoverned_s"] is None


def test_the_table_of_a_trace_has_no_column_for_what_nobody_knows(trace):
    result = invoke("--trace", str(trace))
    assert result.exit_code == 0
    assert "ungoverned" not in result.stdout


# -- plots -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", [["spike"], list(SCENARIOS)[:4]], ids=len)  # a panel; more than a row
def test_it_draws_a_png(tmp_path, names):
    path = tmp_path / "runs.png"
    chosen = [part for name in names for part in ("--scenario", name)]
    assert invoke("--seconds", "5", "--plot", str(path), *chosen).exit_code == 0
    png = path.read_bytes()
    assert png.startswith(b"\x89PNG\r\n")
    width, height = (int.from_bytes(png[at : at + 4], "big") for at in (16, 20))
    assert width >= 500 * min(3, len(names))
    assert height >= 400 * -(-len(names) // 3)


def test_a_trace_without_headroom_can_be_drawn(tmp_path, trace):
    assert invoke("--trace", str(trace), "--plot", str(tmp_path / "t.png")).exit_code == 0
    assert (tmp_path / "t.png").stat().st_size > 5000


def test_without_matplotlib_a_plot_is_refused_at_once_and_all_else_works(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    refused = invoke("--seconds", "5", "--plot", "runs.png")
    assert refused.exit_code == 2
    assert refused.stdout == ""
    assert "plotting needs matplotlib: pip install matplotlib" in refused.stderr
    assert invoke("--seconds", "5", "--scenario", "calm").exit_code == 0


# -- what it refuses ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (["--scenario", "spik"], "unknown scenario 'spik': did you mean spike?"),
        (["--policy", "windw"], "unknown policy 'windw': did you mean window?"),
        (["--set", "hihg=0.2"], "unknown setting 'hihg'"),
        (["--set", "high"], "--set high says no value: give KEY=VALUE"),
        (["--set", "high=nan"], "is not usable: Expected float > 0.0"),
        (["--set", "low=0.5"], "it must not be above high"),
        (["--config", "none.toml"], "cannot read the configuration none.toml"),
        (["--seconds", "nan"], "cannot simulate nan seconds"),
        (["--seconds", "-1"], "cannot simulate -1.0 seconds"),
        (["--ctx", "0"], "--ctx"),
        (["--seed", "x"], "--seed"),
        (["--trace", "none.trace"], "cannot read the trace none.trace"),
        (["--trace", "x", "--scenario", "calm"], "not both"),
        (["--matrix", "--scenario", "calm"], "--matrix has its own machines"),
        (["--plot", "no/such/folder/x.png", "--seconds", "2"], "cannot write the plot no/such/folder/x.png"),
        (["--plto", "x.png"], "--plot"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_gives_one_clear_line(args, told):
    assert_refused(invoke(*args), told)
