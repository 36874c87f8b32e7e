"""What the tests of policies share."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator

import pytest

from psi_kv_governor.policy import registry


@pytest.fixture
def install(tmp_path, monkeypatch) -> Iterator[Callable[[str, dict[str, str]], None]]:
    """Installs a package with these modules, whose entry points for policies are `points`."""

    def install_(points: str, modules: dict[str, str]) -> None:
        for name, text in modules.items():
            (tmp_path / name).write_text(text)
            monkeypatch.delitem(sys.modules, name.removesuffix(".py"), raising=False)
        info = tmp_path / "plugged-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: plugged\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[psi_kv_governor.policies]\n{points}\n")
        monkeypatch.syspath_prepend(tmp_path)
        registry.plug_ins.cache_clear()

    yield install_
    registry.plug_ins.cache_clear()
