"""Every example runs as it is printed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from calm import CALM

EXAMPLES = Path(__file__).parents[2] / "examples"

pytestmark = [pytest.mark.llama, pytest.mark.timeout(900)]


def run(name: str, *arguments: object, said: str = "") -> str:
    done = subprocess.run(
        [sys.executable, EXAMPLES / name, *map(str, arguments)],
        input=said, capture_output=True, text=True, timeout=800, check=False, env={**os.environ, **CALM},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_chat_answers_each_line(demo_model):
    answers = run("chat.py", demo_model, said="What is the capital of France?\nAnd of Italy?\n").splitlines()
    assert len([line for line in answers if line.strip()]) >= 2
    assert "Paris" in answers[0]


def test_robot_says_something_in_every_cycle_and_counts_its_deadlines(shallow_model):
    told = run("robot.py", shallow_model, 2)
    assert len(re.findall(r"^\d: (?:room|tight), \d+ tokens", told, re.MULTILINE)) == 2
    assert "deadlines missed" in told


def test_the_idle_one_of_two_models_gives_and_goes_on(shallow_model):
    told = run("two_models.py", shallow_model)
    idle, busy, returned = (int(found) for found in re.findall(r"^\w+: (\d+) MiB", told, re.MULTILINE))
    assert idle > busy
    assert returned > 0
    assert "idle goes on: '" in told


def test_a_policy_of_one_s_own_decides_what_is_masked(shallow_model):
    told = run("own_policy.py", shallow_model)
    masked, back = (int(found) for found in re.findall(r"^(\d+) cells", told, re.MULTILINE))
    assert masked >= back >= 0  # nothing is short, so the governor itself gives some back meanwhile
    ranges = re.search(r"masked: (.*)", told)[1].split(", ")
    assert len(ranges) > 1  # a comb, and not one run
    assert "masked at the end: ()" in told


def test_every_example_has_its_test():
    tests = "".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))
    named = [(path.name, f'"{path.name}"', f'"{path.stem}"') for path in EXAMPLES.glob("*.py")]
    assert not [name for name, as_file, as_module in named if as_file not in tests and as_module not in tests]
