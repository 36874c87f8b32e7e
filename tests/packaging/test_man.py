"""Man pages: made from the command line's own help, so that they can't say anything else."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest

from psi_kv_governor.cli import COMMANDS
from psi_kv_governor.cli.exec import command as exec_command
from psi_kv_governor.config import GovernorConfig

SCRIPT = Path(__file__).parents[2] / "scripts" / "make_man.py"


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("man")
    subprocess.run([sys.executable, SCRIPT, folder], check=True, stdout=subprocess.DEVNULL)
    return folder


def shown(page: Path) -> str:
    """What a person reads, in one line a word apart."""
    if shutil.which("groff") is None:
        pytest.skip("there is no groff: apt install groff-base")
    done = subprocess.run(
        ["groff", "-man", "-Tascii", "-ww", "-rLL=200n", "-P-c", page],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stderr == ""
    return " ".join("".join(done.stdout.replace("_\b", "").split("\b")).split())


def test_every_command_is_in_the_first_page(pages):
    text = shown(pages / "psi-kv.1")
    assert not [name for name in COMMANDS if f"psi-kv {name} --help" not in text]


def test_every_option_of_exec_is_in_its_page(pages):
    text = (pages / "psi-kv-exec.1").read_text().replace("\\", "")
    options = [parameter for parameter in exec_command.params if isinstance(parameter, click.Option)]
    assert not [one.name for one in options if not all(name in text for name in one.opts)]
    assert "psi-kv exec -- ollama serve" in text


def test_every_setting_is_in_the_page_of_the_file_with_its_default(pages):
    text = (pages / "psi-kv.toml.5").read_text().replace("\\", "")
    for name in GovernorConfig.__struct_fields__:
        assert f"fB{name}fR = " in text
    assert "fBhighfR = 0.1" in text


@pytest.mark.parametrize("name", ["psi-kv.1", "psi-kv-exec.1", "psi-kv.toml.5"])
def test_roff_finds_nothing_to_warn_of(pages, name):
    shown(pages / name)
    if shutil.which("mandoc"):
        done = subprocess.run(
            ["mandoc", "-Tlint", "-Wwarning", pages / name], capture_output=True, text=True, check=False
        )
        assert done.stdout == ""
