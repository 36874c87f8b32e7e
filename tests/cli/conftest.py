"""What the tests of the commands share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture
def own_folder(tmp_path, monkeypatch) -> Path:
    """A working directory without psi-kv.toml, and an environment without settings."""
    monkeypatch.chdir(tmp_path)
    for name in list(os.environ):
        if name.startswith("PSI_KV_"):
            monkeypatch.delenv(name)
    return tmp_path
