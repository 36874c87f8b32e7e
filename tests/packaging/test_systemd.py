"""The units, as systemd's own tools see them."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from waiting import PATIENCE_S

UNITS = Path(__file__).parents[2] / "packaging" / "systemd"
MOST_EXPOSURE = 2.5
"""Of 10, as `systemd-analyze security` counts: below 4 it says OK. Devices and the network stay open."""
BASE = {
    "ollama": "[Service]\nExecStart=/usr/local/bin/ollama serve\nUser=ollama\nGroup=ollama\nRestart=always\n",
    "llama-server": "[Service]\nExecStart=/usr/bin/llama-server\nDynamicUser=yes\n",
}

pytestmark = pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="systemd is not installed: apt install systemd"
)


@pytest.fixture
def root(tmp_path) -> Path:
    """A root in which everything that the units start is there."""
    for program in ("usr/bin/psi-kv", "usr/bin/llama-server", "usr/local/bin/ollama"):
        path = tmp_path / program
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("#!/bin/sh\n")
        path.chmod(0o755)
    folder = tmp_path / "etc/systemd/system"
    folder.mkdir(parents=True)
    for path in ("sysinit.target", "basic.target", "multi-user.target", "shutdown.target", "network.target"):
        (folder / path).write_text("[Unit]\nDescription=here\n")
    (folder / "-.mount").write_text("[Mount]\nWhat=/dev/root\nWhere=/\n")
    shutil.copy(UNITS / "psi-kv@.service", folder)
    for name, text in BASE.items():
        (folder / f"{name}.service").write_text(text)
        shutil.copytree(UNITS / f"{name}.service.d", folder / f"{name}.service.d")
    return tmp_path


def analyze(*arguments: str | Path) -> str:
    done = subprocess.run(
        ["systemd-analyze", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE_S,
    )
    return done.stdout + done.stderr


def version() -> int:
    return int(analyze("--version").split()[1])


@pytest.mark.parametrize("unit", ["psi-kv@llama.service", "ollama.service", "llama-server.service"])
def test_systemd_finds_nothing_wrong_with(unit, root):
    told = analyze("verify", "--man=no", f"--root={root}", unit).splitlines()
    if version() < 254:
        told = [line for line in told if "'MemoryPressureWatch'" not in line]
    assert not [line for line in told if "psi-kv" in line or unit in line], told


def test_verify_would_have_found_it(root):
    unit = root / "etc/systemd/system/psi-kv@.service"
    unit.write_text(unit.read_text().replace("KillMode=mixed", "KilMode=mixed"))
    assert "KilMode" in analyze("verify", "--man=no", f"--root={root}", "psi-kv@llama.service")


def test_the_template_is_locked_up_well(root):
    told = analyze("security", "--offline=yes", f"--root={root}", "psi-kv@llama.service")
    assert (
        float(told.split("Overall exposure level for psi-kv@llama.service: ")[1].split()[0]) < MOST_EXPOSURE
    )


@pytest.mark.parametrize("unit", sorted(UNITS.rglob("*.*"), key=str), ids=lambda path: path.name)
def test_a_signal_reaches_the_program_once(unit):
    if unit.is_file():
        assert "KillMode=mixed" in unit.read_text()
