"""The scripts and the Makefile say in one line what is missing, before they begin."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "scripts" / "build_llama_runner.sh"
TOOLS = ("bash", "dirname", "sed", "cat")


def run(*command, **environment) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, **environment}, cwd=ROOT
    )


@pytest.fixture
def bare(tmp_path) -> dict[str, str]:
    """An environment in which only the shell's own tools are installed, and this Python."""
    for tool in TOOLS:
        (tmp_path / tool).symlink_to(shutil.which(tool))
    gone = {"CC": "", "CXX": "", "CUDACXX": "", "VULKAN_SDK": "", "CUDA_HOME": str(tmp_path / "none")}
    return {**gone, "PATH": str(tmp_path), "VIRTUAL_ENV": sys.prefix}


def test_the_build_script_explains_itself():
    done = run(SCRIPT, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert all(option in done.stdout for option in ("--cpu", "--cuda", "--vulkan", "--model", "example"))


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--frob"], "unknown option --frob"),
        (["--cpu", "--cuda"], "choose one of --cpu and --cuda"),
        (["--model"], "--model needs a file"),
        (["--model=/nowhere.gguf"], "there is no model /nowhere.gguf"),
    ],
)
def test_the_build_script_refuses_bad_options(arguments, line):
    done = run(SCRIPT, *arguments, VIRTUAL_ENV=sys.prefix)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert line in done.stderr


@pytest.mark.parametrize(
    ("arguments", "there", "line"),
    [
        ([], {}, "there is no C compiler"),
        ([], {"CC": "cc"}, "there is no C++ compiler"),
        (["--cuda"], {"CC": "cc", "CXX": "c++"}, "there is no nvcc"),
        (["--vulkan"], {"CC": "cc", "CXX": "c++"}, "there is no glslc"),
        ([], {"VIRTUAL_ENV": "/nowhere"}, "there is no virtual environment"),
    ],
)
def test_the_build_script_names_what_is_missing_before_it_builds(bare, arguments, there, line):
    done = run(SCRIPT, *arguments, **{**bare, **there})
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.count("\n") == 1
    assert line in done.stderr


def test_vulkan_headers_are_looked_for(bare, tmp_path):
    if any(Path(folder, "vulkan/vulkan.h").exists() for folder in ("/usr/include", "/usr/local/include")):
        pytest.skip("this machine has Vulkan headers")
    (tmp_path / "glslc").symlink_to("/bin/true")
    done = run(SCRIPT, "--vulkan", **{**bare, "CC": "cc", "CXX": "c++"})
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "there are no Vulkan headers" in done.stderr


@pytest.fixture
def make(tmp_path):
    if shutil.which("make") is None:
        pytest.skip("this machine has no make")
    (tmp_path / "benchmarks").mkdir()
    for name in ("Makefile", "pyproject.toml", "benchmarks/pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path / name)
    return lambda *arguments: run("make", "-C", str(tmp_path), *arguments)


def test_make_alone_lists_its_targets(make):
    done = make()
    assert done.returncode == 0
    assert all(
        f"make {target} " in done.stdout for target in ("demo", "test", "lint", "bench-quick", "clean")
    )


@pytest.mark.parametrize(
    ("script", "line"), [(None, "there is no "), ("exit 1", "is too old: 3.10 or later")]
)
def test_make_names_what_is_wrong_with_python(make, tmp_path, script, line):
    python = tmp_path / "python-of-old"
    if script:
        python.write_text(f'#!/bin/sh\nif [ "$1" = -V ]; then echo Python 3.8.1; exit; fi\n{script}\n')
        python.chmod(0o755)
    done = make("setup", f"PYTHON={python}")
    assert done.returncode == 2
    assert line in done.stderr
    assert not (tmp_path / ".venv").exists()
