"""Policies by name, and those that other packages bring."""

from __future__ import annotations

from importlib import metadata

import pytest

from psi_kv_governor.config import GovernorConfig
from psi_kv_governor.errors import BadInputError
from psi_kv_governor.policy import POLICIES, Policy, Range, all_policies, get_policy, registry

GOOD = """
import numpy as np
from psi_kv_governor.policy import Policy

class Longest(Policy):
    "Long blocks go last."
    name = "longest"
    source = "a test"
    def score(self, blocks, next_position, evidence):
        return np.array([block.cells for block in blocks], dtype=np.float64)
"""


def test_the_registry_holds_every_policy_under_its_own_name():
    assert list(POLICIES) == ["window", "fifo", "lru", "random", "keynorm", "keydiff", "attention", "hybrid"]
    assert all(policy.name == name for name, policy in POLICIES.items())
    assert GovernorConfig().policy in POLICIES


def test_an_unknown_policy_is_told_the_nearest_and_the_known():
    with pytest.raises(BadInputError) as refused:
        get_policy("kediff")
    assert str(refused.value) == (
        "unknown policy 'kediff': did you mean keydiff? known are "
        "window, fifo, lru, random, keynorm, keydiff, attention, hybrid"
    )


def test_a_plug_in_is_chosen_by_name_like_any_other(install):
    install("longest = plugged:Longest", {"plugged.py": GOOD})
    blocks = [Range(0, 5), Range(9, 10)]
    assert get_policy("longest").score(blocks, 20, None).tolist() == [5.0, 1.0]
    assert list(all_policies()) == [*POLICIES, "longest"]
    with pytest.raises(BadInputError, match=r"known are .*hybrid, longest$"):
        get_policy("nothing like it")


def test_plug_ins_are_not_even_looked_at_for_a_policy_of_the_package(install, monkeypatch):
    install("broken = plugged:Missing", {})
    monkeypatch.setattr(metadata, "entry_points", lambda **_: pytest.fail("looked"))
    assert get_policy("window").name == "window"


@pytest.mark.parametrize(
    ("point", "module", "why"),
    [
        ("mine = nowhere:Class", "", r"ModuleNotFoundError: No module named 'nowhere'"),
        ("mine = plugged:Missing", "", r"AttributeError: module 'plugged' has no attribute 'Missing'"),
        ("mine = plugged:Mine", "raise RuntimeError('two\\nlines')", r"RuntimeError: two\)$"),
        ("mine = plugged:Mine", "Mine = 3", "no subclass of psi_kv_governor.policy.Policy"),
        ("mine = plugged:Longest", GOOD, "its class calls itself longest"),
        ("mine = plugged:Mine", "from psi_kv_governor.policy import Policy as Mine", "TypeError: .*abstract"),
        ("mine = plugged:Mine", "import sys; sys.exit(3)", "SystemExit: 3"),
    ],
)
def test_a_broken_plug_in_gives_one_line_and_stops_nobody_else(install, point, module, why):
    install(point, {"plugged.py": module})
    with pytest.raises(BadInputError, match=f"the policy mine can't be used: .* failed .*{why}") as refused:
        get_policy("mine")
    assert "\n" not in str(refused.value)
    assert list(all_policies()) == list(POLICIES)


def test_a_plug_in_cannot_take_the_name_of_a_policy_of_the_package(install):
    install("window = plugged:Longest", {"plugged.py": GOOD})
    assert type(get_policy("window")) is POLICIES["window"]
    assert list(all_policies()) == list(POLICIES)
    assert "window is a policy of the package: choose another name" in registry.plug_ins()[1]["window"]


def test_a_policy_without_a_score_cannot_be_made():
    class Silent(Policy):
        name = "silent"
        source = "a test"

    with pytest.raises(TypeError, match="abstract"):
        Silent()
