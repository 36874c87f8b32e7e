"""What the tests of the commands share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from evening import CONFIG, evening

from psi_kv_governor.recording import Recorder


@pytest.fixture
def own_folder(tmp_path, monkeypatch) -> Path:
    """A working directory without psi-kv.toml, and an environment without settings."""
    monkeypatch.chdir(tmp_path)
    for name in list(os.environ):
        if name.startswith("PSI_KV_"):
            monkeypatch.delenv(name)
    return tmp_path


@pytest.fixture
def recorded(tmp_path) -> Path:
    path = tmp_path / "evening.jsonl"
    recorder = Recorder(path, CONFIG)
    for turn in evening():
        recorder(turn)
    recorder.close()
    return path
