"""Whatever anybody reads from a cache is what was written there (invariant 1)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.llama

KINDS = {
    "born in a file": ["--backing", "file"],
    "moved to a file": ["--backing", "memory"],
    "a stream for each sequence": ["--backing", "file", "--streams"],
    "moved, a stream for each sequence": ["--backing", "memory", "--streams"],
    "without flash attention": ["--backing", "memory", "--no-flash"],
}


@pytest.mark.parametrize("arguments", KINDS.values(), ids=KINDS)
def test_the_whole_state_stays_that_of_an_ungoverned_twin(arguments, folder):
    """A million operations by hand: `--operations 1000000`."""
    done = subprocess.run(
        [
            sys.executable,
            Path(__file__).with_name("torture.py"),
            "--operations",
            "1000",
            "--place",
            folder,
            *arguments,
        ],
        capture_output=True,
        text=True,
        timeout=800,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "no difference" in done.stdout
    assert " 0 MB given up" not in done.stdout
