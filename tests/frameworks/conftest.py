"""What the tests of frameworks share: what came of the same requests, with us and without.

They need the frameworks: `make test-frameworks` runs them in an environment of its own. Without, nothing here
is collected.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from calm import CALM

if importlib.util.find_spec("guidance") is None:
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(scope="session")
def played(shallow_model, tmp_path_factory) -> dict[str, dict[str, Any]]:
    """What `play.py` says of each framework: without us, and governed with either backing."""
    folder = tmp_path_factory.mktemp("frameworks")
    settings = {
        **CALM,  # what the tests mask stays masked, and nothing else is
        "PSI_KV_STATUS_SOCKET": "false",
        "HF_HUB_OFFLINE": "1",
        "HAYSTACK_TELEMETRY_ENABLED": "False",
    }
    ways = {"plain": {}, "file": {"PSI_KV_BACKING": "file"}, "memory": {"PSI_KV_BACKING": "memory"}}
    found: dict[str, dict[str, Any]] = {}
    for way, more in ways.items():
        with (folder / way).open("wb") as said:
            done = subprocess.run(
                [
                    sys.executable,
                    str(Path(__file__).with_name("play.py")),
                    "governed" if more else "plain",
                    str(shallow_model),
                ],
                env={**os.environ, **(settings if more else {}), **more},
                stdout=said,
                stderr=subprocess.PIPE,
                text=True,
                timeout=1800,
                check=False,
            )
        assert done.returncode == 0, done.stderr[-3000:]
        lines = [line for line in (folder / way).read_text().splitlines() if line.startswith('{"name"')]
        found[way] = {one.pop("name"): one for one in map(json.loads, lines)}
    return found
