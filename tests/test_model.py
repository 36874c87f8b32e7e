"""Where models lie, the check of the demo model, and the script that fetches it."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest

from psi_kv_governor import model
from psi_kv_governor.config import load_config
from psi_kv_governor.errors import BadInputError, PsiKvError

SCRIPT = Path(__file__).parents[1] / "scripts" / "download_demo_model.py"


def test_the_folder_of_models(monkeypatch, tmp_path):
    monkeypatch.setenv("PSI_KV_MODELS", str(tmp_path))
    assert model.models_dir() == tmp_path
    monkeypatch.delenv("PSI_KV_MODELS")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    with_platformdirs = model.models_dir()
    monkeypatch.setitem(sys.modules, "platformdirs", None)
    assert model.models_dir() == with_platformdirs == tmp_path / "data" / "psi-kv" / "models"


def test_the_folder_of_models_is_no_setting_of_the_governor():
    assert load_config(environ={"PSI_KV_MODELS": "/models"}) == load_config(environ={})


def test_models_are_listed_by_name(monkeypatch, tmp_path):
    monkeypatch.setenv("PSI_KV_MODELS", str(tmp_path / "models"))
    assert model.list_models() == []
    for name in ("b.gguf", "a.gguf", "note.txt", ".c.gguf.new"):
        (tmp_path / "models").mkdir(exist_ok=True)
        (tmp_path / "models" / name).write_text("")
    assert [path.name for path in model.list_models()] == ["a.gguf", "b.gguf"]


def test_an_absent_or_half_demo_model_says_how_to_get_it(monkeypatch, tmp_path):
    monkeypatch.setenv("PSI_KV_MODELS", str(tmp_path))
    with pytest.raises(PsiKvError, match="psi-kv model fetch"):
        model.demo_model_path()
    (tmp_path / model.DEMO.file_name).write_bytes(b"GGUF")
    with pytest.raises(PsiKvError, match="psi-kv model fetch"):
        model.demo_model_path()


def test_the_demo_model_is_checked_to_the_last_bit(demo_model, monkeypatch):
    assert model.check(demo_model).size_bytes == model.DEMO.size_bytes
    monkeypatch.setattr(model, "DEMO", dataclasses.replace(model.DEMO, sha256="0" * 64))
    with pytest.raises(BadInputError, match="SHA-256"):
        model.check(model.models_dir() / model.DEMO.file_name)


def test_fetching_the_demo_model_when_it_is_there_only_checks_it(demo_model):
    doing: list[str] = []
    assert model.fetch(lambda what, done, total: doing.append(what)) == demo_model
    assert set(doing) == {"checking"}


def run_script(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs the script as from a bare checkout: neither this package nor any other is installed."""
    command = [sys.executable, "-I", "-S", str(SCRIPT), *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, **environment}
    )


def test_the_script_needs_nothing_installed():
    done = run_script("--help")
    assert done.returncode == 0, done.stderr
    assert "SHA-256" in done.stdout


def test_the_script_finds_a_model_that_is_there(demo_model):
    done = run_script("--to", str(demo_model.parent))
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{demo_model}\n"


def test_the_script_ends_with_one_line_on_a_failure(tmp_path):
    done = run_script("--to", str(tmp_path))
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: this Python has no pip")
    assert "Traceback" not in done.stderr
