"""CI's second step: the tests of a real vLLM run where a change touches it, and only there."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / ".ci" / "vllm"
ENGINE = "src/psi_kv_governor/engines/vllm/parker.py"


def git(folder: Path, *words: str) -> None:
    who = ["-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", "-C", str(folder), *who, *words], check=True, capture_output=True)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """Two commits, and a Makefile that says that it was asked."""
    (tmp_path / ".ci").mkdir()
    shutil.copy(SCRIPT, tmp_path / ".ci" / "vllm")
    (tmp_path / "Makefile").write_text("test-vllm:\n\t@echo tested\n")
    git(tmp_path, "init", "-q", "-b", "main")
    git(tmp_path, "add", "-A")
    git(tmp_path, "commit", "-q", "-m", "first")
    git(tmp_path, "checkout", "-q", "-b", "change")
    return tmp_path


def change(checkout: Path, path: str) -> None:
    (checkout / path).parent.mkdir(parents=True, exist_ok=True)
    (checkout / path).write_text("changed\n")
    git(checkout, "add", "-A")
    git(checkout, "commit", "-q", "-m", "change")


def said(checkout: Path, base: str = "main", **asked: str) -> str:
    environ = {**os.environ, "PSI_KV_CI_DISK_MIB": "1", "PSI_KV_CI_MEMORY_MIB": "1", **asked}
    command = [str(checkout / ".ci" / "vllm"), base]
    return subprocess.run(command, check=True, capture_output=True, text=True, env=environ).stdout


def test_a_change_of_the_engine_is_tested(checkout):
    change(checkout, ENGINE)
    change(checkout, "README.md")
    assert "tested" in said(checkout)


def test_another_change_is_not(checkout):
    change(checkout, "README.md")
    assert "left out: nothing of vLLM changed" in said(checkout)


def test_without_the_branch_that_it_left_the_last_commit_counts(checkout):
    change(checkout, ENGINE)
    assert "tested" in said(checkout, "nobody/knows")
    change(checkout, "README.md")
    assert "left out" in said(checkout, "nobody/knows")


@pytest.mark.parametrize("what", ["PSI_KV_CI_DISK_MIB", "PSI_KV_CI_MEMORY_MIB"])
def test_a_small_machine_says_what_is_missing(checkout, what):
    change(checkout, ENGINE)
    assert "left out: it wants" in said(checkout, **{what: "999999999"})
