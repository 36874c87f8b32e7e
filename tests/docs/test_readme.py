"""The README: no placeholder, no link into nothing, and its Python runs as it is printed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from calm import CALM

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
MOST_LINES = 8


def python(path: Path) -> str:
    """The first block of Python on a page."""
    found = re.search(r"```python\n(.*?)```", path.read_text(), re.DOTALL)
    assert found
    return found[1]


def test_the_one_line_for_a_server_stands_on_the_first_screen():
    first = "\n".join(README.splitlines()[:20])
    assert "psi-kv exec -- llama-server" in first
    assert "psi-kv exec -- ollama serve" in first


def test_nothing_is_a_placeholder():
    assert not re.findall(r"<[a-z][^>\n]*>|TODO|FIXME|example\.com|lorem", README)


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md"])
def test_every_link_to_a_file_has_its_file(name):
    links = re.findall(r"\]\(([^)]+)\)", (ROOT / name).read_text())
    assert not [one for one in links if "://" not in one and not (ROOT / one.partition("#")[0]).exists()]


def test_its_python_is_eight_lines():
    assert len([line for line in python(ROOT / "README.md").splitlines() if line.strip()]) <= MOST_LINES


@pytest.mark.llama
@pytest.mark.parametrize("page", ["README.md", "docs/start/python.md"])
def test_its_python_runs_as_it_is_printed(page, demo_model, tmp_path):
    (tmp_path / "model.gguf").symlink_to(demo_model)
    done = subprocess.run(
        [sys.executable, "-c", python(ROOT / page)],
        cwd=tmp_path, capture_output=True, text=True, timeout=800, check=False,
        env={**os.environ, **CALM},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    said, missed, amount = done.stdout.splitlines()[0], *done.stdout.splitlines()[-2:]
    assert said.strip()
    assert missed in {"None", "computed with the whole context"}
    assert int(amount) >= 0
