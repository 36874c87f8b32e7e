"""One version: the package's, the benchmarks', and the newest release in the changelog."""

from __future__ import annotations

import re
from pathlib import Path

from psi_kv_governor.config import tomllib  # the standard library's, or tomli

ROOT = Path(__file__).parents[2]


def test_the_changelog_has_the_release_that_the_package_is():
    package, benchmarks = (
        tomllib.loads((ROOT / path).read_text())["project"]["version"]
        for path in ("pyproject.toml", "benchmarks/pyproject.toml")
    )
    released = re.findall(
        r"^## \[(\d+\.\d+\.\d+)\] - \d{4}-\d\d-\d\d$", (ROOT / "CHANGELOG.md").read_text(), re.M
    )
    assert package == benchmarks == released[0]
