"""The command line: help without loading anything, one line and a status for every failure."""

import errno
import json
import os
import signal
import subprocess
import sys
import types
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from psi_kv_governor import cli, model
from psi_kv_governor.errors import BadInputError, EngineError

SOURCE = str(Path(cli.__file__).parents[2])
ENVIRONMENT = {**os.environ, "PYTHONPATH": SOURCE}


def run(*arguments: str):
    return CliRunner().invoke(cli.main, list(arguments))


def run_python(code: str, **options) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
        **options,
    )


@pytest.fixture
def command(monkeypatch):
    """Gives the group one more command, `boom`, that does what the test says."""

    def install(body) -> None:
        made = click.Command("boom", callback=body)
        monkeypatch.setitem(cli.COMMANDS, "boom", "")
        monkeypatch.setitem(sys.modules, "psi_kv_governor.cli.boom", types.SimpleNamespace(command=made))

    return install


def raising(error: BaseException):
    def body() -> None:
        raise error

    return body


def test_help_names_every_command_and_loads_none():
    process = run_python(
        "import sys; from psi_kv_governor.cli import main\n"
        "try: main(['--help'])\n"
        "finally: print({m.split('.')[0] for m in sys.modules}"
        " & {'numpy', 'rich', 'llama_cpp', 'msgspec'}, file=sys.stderr)"
    )
    output, modules = process.communicate()
    assert process.returncode == 0
    assert all(f"  {name} " in output for name in cli.COMMANDS)
    assert modules == "set()\n"


def test_what_only_asks_a_governed_process_does_not_wait_for_numpy():
    """A third of the time that `psi-kv status` took to start."""
    names = ("limit", "park", "status", "unpark", "watch")
    imports = "".join(f"import psi_kv_governor.cli.{name}\n" for name in names)
    process = run_python(
        f"import sys\n{imports}print({{'numpy', 'llama_cpp', 'elftools'}} & set(sys.modules))"
    )
    output, errors = process.communicate()
    assert (output, errors) == ("set()\n", "")


def test_as_a_module_it_is_the_same_command():
    done = subprocess.run(
        [sys.executable, "-m", "psi_kv_governor.cli", "--version"],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("psi-kv ")


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_has_help_an_example_and_json(name):
    with click.Context(cli.main) as ctx:
        command = cli.main.get_command(ctx, name)
    assert f"psi-kv {name}" in (command.epilog or "")
    parts = list(command.commands.values()) if isinstance(command, click.Group) else [command]
    for part in parts:
        assert part.help
        assert any("--json" in option.opts for option in part.params), part.name


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--no-such-option"], "No such option"),
        (["smulate"], "Did you mean simulate?"),
        (["zzz"], "Known are exec, run, chat"),
        (["model", "ftch"], "Did you mean fetch?"),
        (["model", "fetch", "--twice"], "No such option"),
    ],
)
def test_bad_usage_says_what_was_meant_and_exits_2(arguments, line):
    result = run(*arguments)
    assert result.exit_code == 2
    assert line in result.stderr
    assert result.stderr.startswith("Usage: psi-kv")


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (BadInputError("low is above high"), 2, "low is above high"),
        (EngineError("the tap is gone"), 1, "the tap is gone"),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), 1, "Permission denied: /x"),
        (OSError("just words"), 1, "unexpected OSError: just words"),
        (MemoryError(), 1, "out of memory"),
        (ModuleNotFoundError("no", name="llama_cpp"), 1, "pip install 'psi-kv-governor[llama]'"),
        (ModuleNotFoundError("no", name="llama_cpp.llama"), 1, "pip install 'psi-kv-governor[llama]'"),
        (ValueError("two\nlines"), 1, "unexpected ValueError: two lines"),
    ],
)
def test_every_failure_is_one_line_and_a_status(command, error, status, line):
    command(raising(error))
    result = run("boom")
    assert result.exit_code == status
    assert result.stderr.startswith("psi-kv: error: ")
    assert line in result.stderr
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""


def test_a_command_without_its_library_says_how_to_install_it(demo_model):
    process = run_python(
        "import sys; sys.modules['llama_cpp'] = None; from psi_kv_governor.cli import main\n"
        f"main(['run', '-m', {str(demo_model)!r}, 'a prompt'])"
    )
    output, said = process.communicate()
    assert (process.returncode, output) == (1, "")
    assert "pip install 'psi-kv-governor[llama]'" in said.splitlines()[-1]
    assert "Traceback" not in said


def test_a_command_chooses_its_status(command):
    command(lambda: click.get_current_context().exit(7))
    assert run("boom").exit_code == 7
    command(lambda: "what it returns is not a status")
    assert run("boom").exit_code == 0


NAP = """
import sys, time, types, click
from psi_kv_governor import cli
def nap():
    print("asleep", flush=True)
    time.sleep(60)
cli.COMMANDS["nap"] = ""
sys.modules["psi_kv_governor.cli.nap"] = types.SimpleNamespace(command=click.Command("nap", callback=nap))
cli.main(["nap"])
"""


def test_an_interruption_is_one_line_and_130():
    process = run_python(NAP)
    assert process.stdout.readline() == "asleep\n"
    process.send_signal(signal.SIGINT)
    _, said = process.communicate()
    assert (process.returncode, said.strip()) == (130, "psi-kv: interrupted")


def test_a_reader_that_goes_away_is_no_error():
    process = run_python(NAP.replace("time.sleep(60)", "[print('x' * 100) for _ in range(10_000)]"))
    assert process.stdout.readline() == "asleep\n"
    process.stdout.close()
    process.wait()
    assert process.stderr.read() == ""
    process.stderr.close()


def test_the_model_is_found_listed_and_checked(demo_model):
    if demo_model.parent != model.models_dir():
        pytest.fail("the demo model is to be in the folder of models")
    assert run("model", "path").stdout == f"{demo_model}\n"
    assert json.loads(run("model", "path", "--json").stdout) == {"path": str(demo_model)}
    listed = json.loads(run("model", "list", "--json").stdout)
    assert str(demo_model) in [entry["path"] for entry in listed]
    assert run("model", "check").stdout == f"{demo_model} is whole: llama, 272 tensors\n"
    checked = json.loads(run("model", "check", str(demo_model), "--json").stdout)
    assert checked["size_bytes"] == model.DEMO.size_bytes


def test_fetching_what_is_there_says_so(demo_model):
    assert "is there already, and right" in run("model", "fetch").stdout
    assert json.loads(run("model", "fetch", "--json").stdout) == {"path": str(demo_model), "fetched": False}


def test_without_models_it_says_how_to_get_one(monkeypatch, tmp_path):
    monkeypatch.setenv("PSI_KV_MODELS", str(tmp_path))
    listed = run("model", "list")
    assert (listed.exit_code, listed.stdout) == (0, "")
    assert "psi-kv model fetch" in listed.stderr
    assert json.loads(run("model", "list", "--json").stdout) == []
    asked = run("model", "path")
    assert (asked.exit_code, asked.stdout) == (1, "")
    assert "psi-kv model fetch" in asked.stderr


def test_a_broken_model_is_listed_with_what_is_wrong(monkeypatch, tmp_path):
    monkeypatch.setenv("PSI_KV_MODELS", str(tmp_path))
    (tmp_path / "broken.gguf").write_bytes(b"GGUF\x03\0\0\0")
    listed = run("model", "list")
    assert listed.exit_code == 0
    assert "truncated" in listed.stdout
    checked = run("model", "check", str(tmp_path / "broken.gguf"))
    assert checked.exit_code == 2
    assert checked.stderr.startswith("psi-kv: error: the model")


def test_doctor_fails_on_what_is_broken_and_shows_the_rest(tmp_path, monkeypatch):
    monkeypatch.setenv("PSI_KV_PLACE", "/dev/shm")
    result = run("doctor", "--model", str(tmp_path / "absent.gguf"))
    assert result.exit_code == 1
    assert [line.split()[0] for line in result.stdout.splitlines() if " model " in line] == ["FAIL"]
    report = json.loads(run("doctor", "--model", str(tmp_path / "absent.gguf"), "--json").stdout)
    assert report["ok"] is False
    assert {check["state"] for check in report["checks"]} <= {"ok", "warn", "fail"}
    place = next(check for check in report["checks"] if check["name"] == "place to park")
    assert place["state"] == "fail"


@pytest.mark.llama
def test_doctor_is_content_with_a_good_model(shallow_model, monkeypatch):
    monkeypatch.setenv("PSI_KV_PLACE_RESERVE_BYTES", "0")
    result = run("doctor", "--model", str(shallow_model), "--json")
    report = json.loads(result.stdout)
    states = {check["name"]: check["state"] for check in report["checks"]}
    assert states["model"] == states.get("can release") == "ok", report["checks"]
    assert states["can evict"] == ("ok" if states["can park"] == "ok" else "warn")
    assert result.exit_code == (0 if "fail" not in states.values() else 1)


def test_doctor_refuses_settings_that_make_no_sense(monkeypatch):
    monkeypatch.setenv("PSI_KV_HIGH", "nan")
    result = run("doctor")
    assert result.exit_code == 2
    assert result.stderr.startswith("psi-kv: error: high = ")
