"""The agent is found or compiled where nobody else can have put it, and llama.cpp stands behind it."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from psi_kv_governor.engines.llama.elf import redirecting
from psi_kv_governor.errors import EngineError
from psi_kv_governor.native import building

COMPILER = str(Path(__file__).parents[2] / "quick-cc")


@pytest.fixture
def only(monkeypatch, tmp_path):
    """Has a compiled agent be kept in `tmp_path/native`, or nowhere."""
    folder = tmp_path / "native"
    monkeypatch.setattr(building, "folders", lambda: [folder])
    monkeypatch.setattr(building, "_SHIPPED", tmp_path / "absent.so")
    monkeypatch.setenv("CC", COMPILER)
    return folder


@pytest.fixture(scope="module")
def built() -> Path:
    """That of the tests: to compile another takes twelve seconds of processor time."""
    return building.agent_path()


@pytest.fixture
def compiled(built, only) -> Path:
    """A copy of it where the loader looks."""
    only.mkdir(mode=0o700)
    path = only / built.name
    shutil.copy(built, path)
    path.chmod(0o500)
    assert building.agent_path() == path
    return path


def test_it_is_compiled_once_and_private(only):
    first = building.agent_path()
    written = first.stat().st_mtime_ns
    assert first.parent == only
    assert only.stat().st_mode & 0o022 == 0
    assert first.stat().st_mode & 0o222 == 0
    assert building.agent_path().stat().st_mtime_ns == written
    assert [path.name for path in only.iterdir()] == [first.name]
    ctypes.CDLL(str(first)).psikv_serve  # noqa: B018  # it can be loaded


def test_one_that_came_with_the_package_needs_no_compiler(compiled, monkeypatch):
    monkeypatch.setattr(building, "_SHIPPED", compiled)
    monkeypatch.setenv("CC", "no-such-compiler")
    assert building.agent_path() == compiled
    assert building.shipped()


def test_without_a_compiler_it_says_what_to_install(only, monkeypatch):
    monkeypatch.setenv("CC", "no-such-compiler")
    with pytest.raises(EngineError, match="no-such-compiler"):
        building.agent_path()


def test_a_compiler_that_fails_leaves_nothing_behind(only, monkeypatch):
    monkeypatch.setenv("CC", "false")
    with pytest.raises(EngineError, match="compiling the agent failed"):
        building.agent_path()
    assert list(only.iterdir()) == []


@pytest.mark.parametrize("mode", [0o777, 0o770])
def test_a_folder_that_others_can_write_to_is_not_trusted(only, mode):
    only.mkdir()
    only.chmod(mode)
    with pytest.raises(EngineError, match="chmod go-w"):
        building.agent_path()


def test_a_planted_library_is_not_loaded(compiled):
    compiled.chmod(0o666)
    with pytest.raises(EngineError, match="others may write"):
        building.agent_path()


def test_a_link_is_not_followed(only, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    only.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(EngineError, match="link"):
        building.agent_path()


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a folder of its own (root)")
def test_a_folder_mounted_noexec_is_named(only):
    only.mkdir(mode=0o700)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "noexec,mode=0700", "none", only], check=True)
    try:
        with pytest.raises(EngineError, match="noexec"):
            building.agent_path()
    finally:
        subprocess.run(["umount", only], check=True)


def test_without_a_home_another_folder_is_found(monkeypatch, tmp_path):
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr("pwd.getpwuid", lambda uid: (_ for _ in ()).throw(KeyError(uid)))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert building.folders()[-1].parent == tmp_path


@pytest.mark.skipif(os.geteuid() != 0, reason="changes to another user (root)")
def test_a_random_user_without_home_or_name_is_no_traceback(tmp_path):
    """As in a container that gives every pod its own number."""
    program = """
import os, sys, tempfile
from psi_kv_governor.engines.llama import process
from psi_kv_governor.native import building
from psi_kv_governor.config import GovernorConfig
from psi_kv_governor.errors import EngineError
os.setgroups([]); os.setgid(0); os.setuid(48213)
try:
    print(building.agent_path())
except EngineError as error:
    print("refused:", error)
print(process.choose(GovernorConfig()))
"""
    tmp_path.chmod(0o777)
    environment = {"PATH": os.environ["PATH"], "TMPDIR": str(tmp_path), "CC": COMPILER}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 2
    assert "Traceback" not in done.stderr


def test_a_library_of_two_names_is_searched_in_their_order(tmp_path):
    """Made without a linker: the first that has a symbol answers."""
    for name, number in (("one", 1), ("two", 2)):
        source = f"int which(void) {{ return {number}; }} int only_{name}(void) {{ return {number}; }}"
        (tmp_path / f"{name}.c").write_text(source)
        subprocess.run(
            [building.compiler(), "-shared", "-fPIC", f"{name}.c", "-o", f"lib{name}.so"],
            cwd=tmp_path,
            check=True,
        )
    both = tmp_path / "both.so"
    both.write_bytes(redirecting([tmp_path / "libone.so", tmp_path / "libtwo.so"]))
    loaded = ctypes.CDLL(str(both))
    assert (loaded.which(), loaded.only_one(), loaded.only_two()) == (1, 1, 2)


def test_on_a_machine_of_another_kind_it_is_refused_by_name(monkeypatch):
    monkeypatch.setattr("platform.machine", lambda: "s390x")
    with pytest.raises(NotImplementedError, match="s390x"):
        redirecting([Path("/a.so")])
