"""The example in docs/policies.md does what it says."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from psi_kv_governor.cache import Range
from psi_kv_governor.cli import main
from psi_kv_governor.engines.simulated import PaperSequence
from psi_kv_governor.engines.simulated.evidence import PaperEvidence
from psi_kv_governor.errors import BadInputError
from psi_kv_governor.policy import POLICIES, get_policy

DOCS = (Path(__file__).parents[2] / "docs" / "policies.md").read_text(encoding="utf-8")


def block(language: str) -> str:
    found = re.search(rf"```{language}\n(.*?)```", DOCS, re.DOTALL)
    assert found
    return found.group(1)


@pytest.fixture
def installed(install):
    [point] = [line for line in block("toml").splitlines() if line.startswith("fading")]
    install(point.replace('"', ""), {"fading.py": block("python")})


@pytest.mark.usefixtures("installed")
def test_the_example_can_be_chosen_by_name():
    done = CliRunner().invoke(main, ["policies", "--json"])
    [listed] = [policy for policy in json.loads(done.output)["policies"] if policy["plug_in"]]
    assert (listed["name"], listed["needs"]) == ("fading", ["attention"])
    assert listed["about"] == "Tokens that got little attention go first, old ones sooner."
    done = CliRunner().invoke(main, ["simulate", "--scenario", "spike", "--policy", "fading", "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.output)["scenarios"][0]["trims"] > 0


@pytest.mark.usefixtures("installed")
def test_the_example_lets_old_attention_fade():
    sequence = PaperSequence(0, 8192)
    sequence.decode(8192, 0.0)
    evidence = PaperEvidence(sequence, 8192)
    fading, attention = get_policy("fading"), get_policy("attention")
    blocks = [Range(start, start + 64) for start in (0, 6144)]
    plain, faded = (policy.score(blocks, 8192, evidence) for policy in (attention, fading))
    assert (faded / plain).tolist() == pytest.approx([1 / 16, 1 / 2])
    with pytest.raises(BadInputError, match="half_life = 0 is not usable"):
        type(fading)(half_life=0)


def test_every_policy_is_in_the_table():
    assert re.findall(r"^\| `(\w+)` \|", DOCS, re.MULTILINE) == list(POLICIES)
