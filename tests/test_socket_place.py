"""Where a status socket may be, whatever folders a machine has or hides."""

from __future__ import annotations

from pathlib import Path

from psi_kv_governor import socket_place


def test_a_runtime_folder_that_cannot_be_entered_is_passed_over(monkeypatch, tmp_path):
    """ProtectHome= hides /run/user: asking whether the folder is there raises then."""
    monkeypatch.setattr(Path, "is_dir", refuse_to_look)
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/hidden")
    monkeypatch.delenv("RUNTIME_DIRECTORY", raising=False)
    monkeypatch.setattr(socket_place, "cache_folder", lambda: tmp_path)
    assert next(iter(socket_place.folders())) == tmp_path / "run"


def refuse_to_look(path):
    raise PermissionError(13, "Permission denied", str(path))


def test_folders_of_the_unit_come_first(monkeypatch, tmp_path):
    """And without a home no folder is made that has ~ for its name."""
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    monkeypatch.setattr(
        socket_place, "_LONGEST_PATH", 4096
    )  # a test's own folder may be too long for a socket
    for name, folder in (("RUNTIME_DIRECTORY", "r"), ("CACHE_DIRECTORY", "c")):
        (tmp_path / folder).mkdir()
        monkeypatch.setenv(name, f"{tmp_path / folder}:/second")
    monkeypatch.setattr(socket_place, "cache_folder", lambda: Path("~/.cache/psi-kv"))
    found = list(socket_place.folders())
    assert found[0] == tmp_path / "r" / "psi-kv"
    assert tmp_path / "c" / "psi-kv-run" in found
    assert all(folder.is_absolute() for folder in found)
