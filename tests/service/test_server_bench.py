"""The scene of `benchmarks/server_bench.py`, small: one dies of its limit at once, the other serves."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "server_bench.py"
SMALL = ("--talks", "2", "--shots", "2", "--tokens", "300", "--shot-tokens", "50")


@pytest.mark.llama
@pytest.mark.cgroup
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_in_a_limit_that_kills_the_server_at_its_start_the_governed_one_serves(python_of_servers, tmp_path):
    subprocess.run(
        [sys.executable, str(SCRIPT), "--limit-mib", "320", *SMALL, "--out", str(tmp_path)], check=True
    )
    plain, governed = json.loads((tmp_path / "server.json").read_text())["runs"]
    assert plain["kills"] >= 1
    assert plain["died"] == "starting"
    assert (governed["kills"], governed["died"]) == (0, "")
    assert [one["prompt_n"] for one in governed["requests"] if one["kind"] == "return"] == [2, 2]
    assert (tmp_path / "server.png").stat().st_size > 1000
