"""Whatever the machine or the program does, a model runs at least as well as without the agent."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import scripts

from gguf_models import LARGE

pytestmark = pytest.mark.llama

backings = pytest.mark.parametrize("backing", ["file", "memory"])


@pytest.fixture
def run(tiny_model, folder):
    """Runs a script with the path of a model and a folder to park in; gives what it prints."""

    def run_(script: str, *arguments: str, **options) -> str:
        done = subprocess.run(
            [sys.executable, "-c", script, str(tiny_model(LARGE)), *(arguments or (str(folder),))],
            capture_output=True,
            text=True,
            timeout=800,
            check=False,
            **options,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    return run_


@backings
def test_after_a_fork_neither_process_sees_the_other_s_writes(run, folder, backing):
    assert "both whole" in run(scripts.FORK, str(folder), backing)


@backings
def test_under_a_filter_that_kills_at_mincore_bytes_are_counted_otherwise(run, folder, backing):
    assert "alive" in run(scripts.FILTERED, str(folder), backing)


@backings
def test_batches_of_one_and_two_tokens_are_decoded(run, folder, backing):
    assert "all sizes" in run(scripts.BATCHES, str(folder), backing)


@backings
def test_a_limit_on_the_size_of_files_leaves_the_cache_in_memory(run, folder, backing):
    assert "runs on" in run(scripts.LIMITED, str(folder), backing)


def test_a_library_that_the_user_chose_himself_stands_behind_the_agent(run, tmp_path):
    installed = Path(importlib.util.find_spec("llama_cpp").origin).parent / "lib"
    shutil.copytree(installed, tmp_path / "lib", symlinks=True)
    assert "governed" in run(scripts.OWN_LIBRARY, str(tmp_path / "lib"))


@backings
def test_two_versions_of_llama_cpp_each_reach_their_own(run, folder, tmp_path, backing):
    """A copy whose libraries have other names stands for another version, loaded past the agent."""
    installed = Path(importlib.util.find_spec("llama_cpp").origin).parent / "lib"
    copies = tmp_path / "other"
    copies.mkdir()
    for library in installed.glob("lib*.so.0"):
        renamed = library.read_bytes().replace(b"libllama.so", b"libllamb.so").replace(b"libggml", b"libggmm")
        name = library.name.replace("libllama", "libllamb").replace("libggml", "libggmm")
        (copies / name).write_bytes(renamed)
    (copies / "libllama.so").symlink_to("libllamb.so.0")
    assert "each its own" in run(scripts.TWO_VERSIONS, str(folder), backing, str(copies))


def test_where_huge_pages_are_on_the_cache_has_none(run, folder):
    """One would make 2 MiB resident for a row, and no part of it could be returned."""
    assert "system's size" in run(scripts.HUGE_PAGES, str(folder))


def test_where_llama_cpp_was_imported_before_it_says_so_and_the_model_runs(run):
    assert "plain" in run(scripts.IMPORTED_BEFORE)


@backings
def test_locked_memory_stays_and_it_is_said_why(run, folder, backing):
    assert "runs on" in run(scripts.LOCKED, str(folder), backing)


def test_where_no_mapping_is_left_nothing_is_lost(run, folder):
    assert "whole" in run(scripts.MANY_MAPPINGS, str(folder))
