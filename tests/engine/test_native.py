"""The native tap is compiled once, by whatever compiler there is; every way to fail has one clear line."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from engine_help import SOURCES, run_python
from models import LLAMA

from psi_kv_governor.engine.llama import native
from psi_kv_governor.errors import EngineError

pytestmark = pytest.mark.llama


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache folder of one's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "psi-kv" / "native"


def test_it_is_compiled_once(cache):
    path = native.library_path()
    first = path.stat()
    assert path.parent == cache
    assert native.library_path() == path
    assert path.stat().st_mtime_ns == first.st_mtime_ns
    assert cache.stat().st_mode & 0o777 == 0o700  # what is in there gets loaded: nobody else may write it
    native.Native(path)  # loads, and has every function


def test_other_flags_make_another_library(cache, monkeypatch):
    path = native.library_path()
    monkeypatch.setattr(native, "_FLAGS", (*native._FLAGS, "-g"))
    assert native.library_path() != path
    assert len(list(cache.iterdir())) == 2


def test_two_processes_may_compile_at_once(cache):
    script = "from psi_kv_governor.engine.llama import native; native.load(); print(native.library_path())"
    environ = {**os.environ, "PYTHONPATH": str(SOURCES)}
    started = [
        subprocess.Popen([sys.executable, "-c", script], env=environ, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    printed = [process.communicate(timeout=60)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0]
    assert printed[0] == printed[1]
    assert [str(path) for path in cache.iterdir()] == [printed[0].strip()]  # no half-made file stays


@pytest.mark.parametrize(
    ("compiler", "words"),
    [
        ("/nonexistent", "no C compiler found .*/nonexistent.*install one"),
        ("", "no C compiler found"),
        ("false", "compiling the tap failed"),
    ],
)
def test_without_a_compiler_it_says_what_to_do(cache, monkeypatch, compiler, words):
    monkeypatch.setenv("CC", compiler)
    if not compiler:
        monkeypatch.setenv("PATH", str(cache))
    with pytest.raises(EngineError, match=words) as error:
        native.library_path()
    assert "\n" not in str(error.value)
    assert not cache.exists() or list(cache.iterdir()) == []


@pytest.mark.parametrize("arguments", ["-O1", "-O1 -pipe"])
def test_cc_may_have_arguments(cache, monkeypatch, arguments):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("CC", f"{native.compiler()} {arguments}")
    assert native.library_path().is_file()


def test_a_cache_that_cannot_be_written_is_told(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(EngineError, match=r"cannot write the compiled tap to .*/file/.*: Not a directory"):
        native.library_path()


def test_missing_headers_are_told(tmp_path, monkeypatch):
    package = tmp_path / "llama_cpp"
    package.mkdir()
    monkeypatch.setattr(native, "llama_cpp_package", lambda: package)
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    with pytest.raises(EngineError, match=r"ggml headers are not beside .*reinstall"):
        native.header_dir()


def test_a_missing_llama_cpp_is_told(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    native.llama_cpp_package.cache_clear()
    try:
        with pytest.raises(EngineError, match="llama-cpp-python is not installed: pip install"):
            native.llama_cpp_package()
    finally:
        monkeypatch.undo()
        native.llama_cpp_package.cache_clear()


def test_a_model_runs_ungoverned_where_there_is_no_compiler(tiny_model, tmp_path):
    printed = run_python(
        """
import sys
from psi_kv_governor import GovernedLlama
llm = GovernedLlama(sys.argv[1], n_ctx=256, n_threads=1, verbose=False)
print(llm.create_completion("the", max_tokens=4, temperature=0)["usage"]["completion_tokens"])
print(llm.governor.capabilities.release.why)
llm.governor.step()
print(llm.governor.status().live_cells)
llm.close()
""",
        tiny_model(LLAMA),
        CC="/nonexistent",
        XDG_CACHE_HOME=str(tmp_path),
    ).splitlines()
    assert int(printed[0]) > 0
    assert printed[1].startswith("no C compiler found ($CC (/nonexistent))")
    assert printed[2] == "0"
