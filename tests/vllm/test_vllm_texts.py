"""Greedy texts of a real engine are the same while its blocks are given up behind its back."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

CHILD = Path(__file__).with_name("texts_child.py")


def told_by(model: Path, verbs: str, **engine: object) -> dict:
    """What the child says after its three rounds. Two to three minutes, most of it vLLM's own start."""
    ran = subprocess.run(
        [sys.executable, str(CHILD), str(model), verbs, json.dumps(engine)],
        check=False,
        capture_output=True,
        text=True,
        timeout=1200,
    )
    line = next((line for line in ran.stdout.splitlines() if line.startswith("TOLD ")), "")
    assert line, ran.stdout[-3000:] + ran.stderr[-3000:]
    return json.loads(line.removeprefix("TOLD "))


@pytest.mark.timeout(1300)
def test_texts_are_the_same_while_blocks_are_parked_and_while_requests_stand_still(served_model):
    told = told_by(served_model, "park,mask")
    for verb, round_of in told.items():
        assert round_of["same"] == round_of["of"] == 40, verb
        assert round_of["bytes_returned"] > 1 << 20, verb
    assert told["mask"]["preempted"] > 0


TENSORS = {"tensor_parallel_size": 2}
"""Each rank holds half of every block."""
STAGES = {
    "pipeline_parallel_size": 2,
    # Eager stages end in vLLM itself (no warm-up makes their tensors): traced, and then run as they are.
    "enforce_eager": False,
    "compilation_config": {"mode": 2, "backend": "eager"},
}
"""Each rank holds half of the layers, and two steps are under way at a time."""


@pytest.mark.slow
@pytest.mark.timeout(1300)
@pytest.mark.parametrize("ranks", [TENSORS, STAGES], ids=["tensors", "stages"])
def test_texts_are_the_same_over_two_ranks(tmp_path, ranks):
    """Both park their part of a block."""
    told = told_by(tmp_path / "wide", "park,mask", wide=True, **ranks)
    for verb, round_of in told.items():
        assert round_of["same"] == round_of["of"] == 40, verb
        assert round_of["ranks"] == 2
        assert round_of["bytes_returned"] > 1 << 20, verb
