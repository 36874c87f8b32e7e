"""`psi-kv policies`, and choosing one on the command line."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from psi_kv_governor.cli import main
from psi_kv_governor.config import GovernorConfig
from psi_kv_governor.policy import POLICIES, registry


def run(*arguments: str):
    return CliRunner().invoke(main, list(arguments))


def test_every_policy_has_a_line_with_its_source():
    done = run("policies")
    assert done.exit_code == 0
    lines = done.output.splitlines()
    assert [line[2:].split()[0] for line in lines] == list(POLICIES)
    assert [line[2:].split()[0] for line in lines if line.startswith("*")] == [GovernorConfig().policy]
    for line, policy in zip(lines, POLICIES.values(), strict=True):
        assert line.endswith(f"[{policy.source}]")


def test_the_json_says_what_a_policy_needs():
    listed = json.loads(run("policies", "--json").output)
    assert listed["broken"] == {}
    policies = {policy["name"]: policy for policy in listed["policies"]}
    assert list(policies) == list(POLICIES)
    assert policies["hybrid"]["needs"] == ["attention", "key_norms"]
    assert not policies["window"]["needs"]
    assert not any(policy["plug_in"] for policy in policies.values())


def test_a_broken_plug_in_is_one_line_of_the_list(monkeypatch):
    monkeypatch.setattr(
        "psi_kv_governor.cli.policies.plug_ins", lambda: ({}, {"mine": "plugged:Mine failed"})
    )
    done = run("policies")
    assert done.exit_code == 0
    assert "mine can't be used: plugged:Mine failed" in done.output
    assert "mine" in json.loads(run("policies", "--json").stdout)["broken"]
    registry.plug_ins.cache_clear()


@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_can_be_simulated_and_repeats_itself(name):
    arguments = ("simulate", "--scenario", "sawtooth", "--seconds", "60", "--policy", name, "--json")
    done = run(*arguments)
    assert done.exit_code == 0, done.output
    [outcome] = json.loads(done.output)["scenarios"]
    assert outcome["trims"] > 0
    assert outcome["restores"] > 0
    assert run(*arguments).output == done.output


def test_an_unknown_policy_is_bad_input():
    done = run("simulate", "--policy", "widow")
    assert done.exit_code == 2
    assert "unknown policy 'widow': did you mean window?" in done.output
