"""`exec -- vllm serve` and `doctor -- vllm serve`: what is added, and what speaks against it."""

import json
import os
import stat
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from psi_kv_governor.cli import main
from psi_kv_governor.config import GovernorConfig
from psi_kv_governor.engines.vllm import serve
from waiting import PATIENCE_S

SERVE = ["vllm", "serve", "some/model", "--port", "8000"]


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """A Python in which a vLLM of some version is installed, with our plugin or without."""

    def install(version: str = "0.32.0", plugin: bool = True) -> Path:
        packages = tmp_path / "packages"
        for name, entry in (
            (f"vllm-{version}", ""),
            (
                "psi_kv_beside-1",
                "[vllm.general_plugins]\npsi_kv_governor = there:register\n" if plugin else "",
            ),
        ):
            folder = packages / f"{name}.dist-info"
            folder.mkdir(parents=True)
            project, _, number = name.rpartition("-")
            folder.joinpath("METADATA").write_text(
                f"Metadata-Version: 2.1\nName: {project}\nVersion: {number}\n"
            )
            folder.joinpath("entry_points.txt").write_text(entry)
        script = tmp_path / "bin" / "vllm"
        script.parent.mkdir()
        said = tmp_path / "said"
        script.write_text(
            f"#!{tmp_path}/bin/python\nimport sys\nopen({str(said)!r}, 'w').write('\\n'.join(sys.argv[1:]))\n"
        )
        # The interpreter that the script names knows nothing but these packages.
        python = tmp_path / "bin" / "python"
        python.write_text(f'#!/bin/sh\nexec env PYTHONPATH={packages} {sys._base_executable} -S "$@"\n')
        for one in (script, python):
            one.chmod(one.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("PATH", f"{script.parent}:{os.environ['PATH']}")
        monkeypatch.setattr(serve, "_LOOK_S", PATIENCE_S)
        return script

    return install


def prepared(script: Path, *arguments: str, config: GovernorConfig | None = None) -> serve.Serving:
    return serve.prepare([*SERVE, *arguments], script, config or GovernorConfig(), dict(os.environ))


@pytest.mark.parametrize(
    ("command", "is_one"),
    [
        (SERVE, True),
        (["/opt/bin/vllm", "serve"], True),
        (["python3", "-m", "vllm.entrypoints.openai.api_server", "--model", "m"], True),
        (["vllm", "bench", "serve"], False),
        (["llama-server"], False),
        ([], False),
    ],
)
def test_what_is_a_server_of_vllm(command, is_one):
    assert serve.is_serve(command) is is_one


def test_the_connector_is_added_and_the_rest_is_as_it_was(installed):
    serving = prepared(installed())
    assert serving.why_not == ""
    assert list(serving.command[: len(SERVE)]) == SERVE
    option, value = serving.command[len(SERVE) :]
    assert option == "--kv-transfer-config"
    assert json.loads(value)["kv_connector"] == "PsiKvConnector"
    assert "kv_connector_extra_config" not in json.loads(value)
    assert "0.32.0" in serving.told


def test_settings_go_to_every_rank(installed):
    serving = prepared(installed(), config=GovernorConfig(place="/data", backing="file"))
    assert json.loads(serving.command[-1])["kv_connector_extra_config"] == {
        "place": "/data",
        "backing": "file",
    }


def test_a_list_of_plugins_gets_ours_too(installed, monkeypatch):
    monkeypatch.setenv("VLLM_PLUGINS", "lora_filesystem_resolver")
    assert prepared(installed()).environ["VLLM_PLUGINS"] == "lora_filesystem_resolver,psi_kv_governor"


def test_a_newer_version_is_tried_and_said_to_be_new(installed):
    serving = prepared(installed("0.99.1"))
    assert serving.why_not == ""
    assert "newest that was tested" in serving.told


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--kv-transfer-config", "{}"], "a KV connector already"),
        (["--kv_transfer_config={}"], "a KV connector already"),
        (["--kv-transfer-config.kv_connector", "X"], "a KV connector already"),
        (["--kv-offloading-size", "4"], "a KV connector already"),
        (["--enable-sleep-mode"], "sleep mode"),
        (["--enforce-eager", "-pp", "2"], "several pipeline stages"),
        (["--enforce-eager", "--pipeline-parallel-size=4"], "several pipeline stages"),
    ],
)
def test_arguments_that_leave_it_ungoverned_say_what_to_do(installed, arguments, why):
    serving = prepared(installed(), *arguments)
    assert why in serving.why_not
    assert "leave" in serving.why_not
    assert "\n" not in serving.why_not
    assert list(serving.command) == [*SERVE, *arguments]  # as it would be without us


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("model: m\nkv-transfer-config: '{}'\n", "a KV connector already"),
        ("kv_transfer_config:\n  kv_connector: X\n", "a KV connector already"),
        ("enable-sleep-mode: true  # at night\n", "sleep mode"),
        ("enforce-eager: true\npipeline_parallel_size: 2 # nodes\n", "several pipeline stages"),
        ("enable-sleep-mode: false\n# kv-transfer-config: {}\nother:\n  enable-sleep-mode: true\n", ""),
        ("port: 8000\n", ""),
    ],
)
def test_what_a_file_of_options_says_counts_too(tmp_path, text, why):
    """vLLM lets the command line win: an option of ours would pass over a connector in the file."""
    file = tmp_path / "options.yaml"
    file.write_text(text)
    for arguments in (["--config", str(file)], [f"--config={file}"]):
        told = serve.why_not(arguments)
        assert why in told if why else told == ""


def test_a_file_of_options_that_is_not_there_is_for_vllm_to_name(tmp_path):
    assert serve.why_not(["--config", str(tmp_path / "none.yaml")]) == serve.why_not(["--config"]) == ""


@pytest.mark.parametrize("arguments", [["--enforce-eager"], ["-pp", "2"], ["--enforce-eager", "-pp", "1"]])
def test_arguments_that_do_no_harm(arguments):
    assert serve.why_not(arguments) == ""


def test_an_old_version_is_named(installed):
    assert "0.30.2 is older than 0.31" in prepared(installed("0.30.2")).why_not


def test_a_plugin_that_is_not_beside_vllm_is_missed(installed):
    assert "pip install 'psi-kv-governor[vllm]' there" in prepared(installed(plugin=False)).why_not


def test_exec_starts_it_with_the_connector(installed, tmp_path):
    installed()
    ran = os.spawnlp(
        os.P_WAIT, sys.executable, sys.executable, "-m", "psi_kv_governor.cli", "exec", "--", *SERVE
    )
    said = (tmp_path / "said").read_text().splitlines()
    assert ran == 0
    assert said[:4] == SERVE[1:]
    assert said[4] == "--kv-transfer-config"


def test_exec_starts_it_as_it_is_where_it_can_not_be_governed(installed, tmp_path, capfd):
    installed("0.30.0")
    ran = os.spawnlp(
        os.P_WAIT, sys.executable, sys.executable, "-m", "psi_kv_governor.cli", "exec", "--", *SERVE
    )
    assert ran == 0
    assert (tmp_path / "said").read_text().splitlines() == SERVE[1:]
    assert "vllm runs ungoverned: vLLM 0.30.0 is older" in capfd.readouterr().err


def test_doctor_says_what_it_would_be(installed):
    installed()
    good = CliRunner().invoke(main, ["doctor", "--", *SERVE])
    bad = CliRunner().invoke(main, ["doctor", "--", *SERVE, "--enable-sleep-mode"])
    assert (good.exit_code, bad.exit_code) == (0, 1)
    assert "vLLM 0.32.0" in good.output
    assert "sleep mode" in bad.output


def test_a_dry_run_starts_nothing(installed, tmp_path):
    installed()
    told = CliRunner().invoke(main, ["exec", "--dry-run", "--json", "--", *SERVE])
    assert json.loads(told.output)["governed"] is True
    assert not (tmp_path / "said").exists()
