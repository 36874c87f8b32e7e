"""The wheel of a platform: built from this tree, installed where there is no compiler, and used there."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MOST_BYTES = 2 << 20
"""The package alone: 0.6 MB when this was written."""
MOST_INSTALLED_BYTES = 200 << 20
"""With all that it needs: 85 MB, of which numpy is 70."""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(sys.platform != "linux", reason="the agent is a library for Linux"),
]

GOVERNED = """
import sys
from llama_cpp import Llama
llm = Llama(sys.argv[1], n_ctx=512, n_threads=2, verbose=False)
llm.eval(llm.tokenize(b"The capital of France is"))
print(*{line.split()[-1] for line in open("/proc/self/maps") if "psikv" in line})
"""


def run(*command: str | Path, check: bool = True, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if name not in {"CC", "PYTHONPATH"}}
    done = subprocess.run(
        [str(word) for word in command],
        capture_output=True,
        text=True,
        check=False,
        timeout=500,
        cwd=ROOT,
        env={**kept, **environment},
    )
    if check:
        assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", folder, ".")
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> tuple[Path, dict[str, str]]:
    """`psi-kv` in a fresh environment, and the variables of a machine on which nothing can be compiled."""
    folder = tmp_path_factory.mktemp("bare")
    run(sys.executable, "-m", "venv", folder / "venv")
    began_s = time.monotonic()
    run(folder / "venv/bin/pip", "install", "--disable-pip-version-check", wheel)
    took_s = time.monotonic() - began_s
    size = sum(
        path.lstat().st_size for path in (folder / "venv").rglob("site-packages/**/*") if path.is_file()
    )
    pip = sum(p.lstat().st_size for p in (folder / "venv").rglob("site-packages/pip/**/*") if p.is_file())
    mb = [n_bytes / 1e6 for n_bytes in (size - pip, wheel.stat().st_size)]
    print(f"\ninstalled in {took_s:.0f} s: {mb[0]:.0f} MB; the wheel alone {mb[1]:.1f} MB")
    assert size < MOST_INSTALLED_BYTES
    (folder / "path").mkdir()
    for tool in ("sh", "sleep", "true"):
        (folder / "path" / tool).symlink_to(shutil.which(tool) or tool)
    (folder / "cache").mkdir()
    return folder / "venv/bin/psi-kv", {
        "PATH": str(folder / "path"),
        "XDG_CACHE_HOME": str(folder / "cache"),
        "PSI_KV_MODELS": str(folder / "models"),
    }


def test_the_wheel_has_the_agent_compiled_and_is_one_for_every_python(wheel):
    assert "-py3-none-linux_" in wheel.name
    assert wheel.stat().st_size < MOST_BYTES
    names = zipfile.ZipFile(wheel).namelist()
    assert "psi_kv_governor/engines/llama/libpsikv_agent.so" in names
    assert not [name for name in names if name.startswith(("tests", "hatch_build"))]


def test_the_agent_needs_nothing_but_the_c_library(wheel):
    told = run(sys.executable, "-m", "auditwheel", "show", wheel).stdout
    assert "manylinux_2_" in told


def test_an_install_that_is_worked_on_compiles_on_first_use(tmp_path):
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv")
    pip = (sys.executable, "-m", "pip", "--python", tmp_path / "venv/bin/python")
    run(*pip, "install", "--no-deps", "--editable", ".")
    assert not list((tmp_path / "venv").rglob("*.so"))
    assert not list((ROOT / "src").rglob("libpsikv_agent.so"))


def test_without_a_compiler_doctor_says_that_none_is_needed(installed):
    psi_kv, bare = installed
    told = run(psi_kv, "doctor", check=False, **bare)
    assert "the agent came compiled" in told.stdout
    assert "site-packages/psi_kv_governor/engines/llama/libpsikv_agent.so" in told.stdout
    assert "Traceback" not in told.stderr


def test_without_a_compiler_exec_runs_a_program_and_ends_as_it_ends(installed):
    psi_kv, bare = installed
    done = run(psi_kv, "exec", "--", "sh", "-c", "exit 7", check=False, **bare)
    assert done.returncode == 7
    assert "ungoverned" not in done.stderr


@pytest.mark.llama
def test_without_a_compiler_exec_governs_a_program_of_another_environment(installed, demo_model):
    psi_kv, bare = installed
    done = run(psi_kv, "exec", "--", sys.executable, "-c", GOVERNED, demo_model, **bare)
    assert str(psi_kv.parents[1]) in done.stdout
    assert "libpsikv_agent.so" in done.stdout
    assert "opened no llama.cpp cache" not in done.stderr
