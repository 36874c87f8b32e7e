"""The example with LangChain runs as it is printed, where LangChain is."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from calm import CALM

pytest.importorskip("langchain_community", reason="LangChain is in the environment of `make test-frameworks`")
EXAMPLE = Path(__file__).parents[2] / "examples" / "langchain_llm.py"


@pytest.mark.llama
@pytest.mark.timeout(900)
def test_langchain_s_own_llm_parks_and_answers_the_same(demo_model):
    done = subprocess.run(
        [sys.executable, EXAMPLE, demo_model],
        capture_output=True, text=True, timeout=800, check=False, env={**os.environ, **CALM},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(re.search(r"^parked: (\d+) MiB", done.stdout, re.MULTILINE)[1]) > 0
    assert "the same answer: True" in done.stdout
