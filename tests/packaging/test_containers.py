"""The descriptions for containers: what can be said of them without a container engine."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from psi_kv_governor.cli.exec import command

PACKAGING = Path(__file__).parents[2] / "packaging"
yaml = pytest.importorskip("yaml")


def deployment() -> dict:
    return yaml.safe_load((PACKAGING / "kubernetes/llama.yaml").read_text())["spec"]["template"]["spec"]


def compose() -> dict:
    return yaml.safe_load((PACKAGING / "compose/compose.yaml").read_text())


def test_the_image_starts_a_program_under_the_governor_and_parks_on_a_volume():
    text = (PACKAGING / "Containerfile").read_text()
    assert json.loads(re.search(r"^ENTRYPOINT (.*)$", text, re.MULTILINE)[1]) == ["psi-kv", "exec", "--"]
    volume = re.search(r"^VOLUME (\S+)$", text, re.MULTILINE)[1]
    assert f"ENV PSI_KV_PLACE={volume}" in text
    copied = [
        name for line in re.findall(r"^COPY (?!--)(.*)$", text, re.MULTILINE) for name in line.split()[:-1]
    ]
    assert all((PACKAGING.parent / name).exists() for name in copied)


def test_kubernetes_has_a_limit_a_disk_to_park_on_and_probes():
    spec = deployment()
    (container,) = spec["containers"]
    assert container["resources"]["limits"]["memory"]
    places = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    (parked,) = [one for one in spec["volumes"] if one["name"] == places["/var/lib/psi-kv"]]
    assert parked["emptyDir"].get("medium", "") == ""
    assert {"startupProbe", "livenessProbe", "readinessProbe"} <= container.keys()
    assert spec["terminationGracePeriodSeconds"]


def test_compose_has_a_limit_and_a_disk_to_park_on():
    service = compose()["services"]["llama"]
    assert service["mem_limit"]
    assert "parked:/var/lib/psi-kv" in service["volumes"]
    assert "/var/lib/psi-kv" not in service["tmpfs"]


@pytest.mark.parametrize(
    "words", [deployment()["containers"][0]["command"], compose()["services"]["llama"]["entrypoint"]]
)
def test_the_commands_are_ones_that_psi_kv_understands(words):
    assert words[:2] == ["psi-kv", "exec"]
    context = command.make_context("exec", [*words[2:], "llama-server"])
    assert context.params["metrics"] == "0.0.0.0:9464"
    assert context.params["program"] == ("llama-server",)
