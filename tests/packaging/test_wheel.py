"""The wheel of a platform: built from this tree, installed where there is no compiler, and used there."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import servers

from packages_help import FETCH_S, Unavailable
from waiting import PATIENCE_S, until

ROOT = Path(__file__).parents[2]
MACHINES = ("aarch64", "x86_64")
MOST_BYTES = 2 << 20
"""The package alone: 0.6 MB when this was written."""
MOST_INSTALLED_BYTES = 200 << 20
"""With all that it needs: 85 MB, of which numpy is 70."""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="the agent is a library for Linux"),
]

GOVERNED = """
import sys
from llama_cpp import Llama
llm = Llama(sys.argv[1], n_ctx=512, n_threads=2, verbose=False)
llm.eval(llm.tokenize(b"The capital of France is"))
print(*{line.split()[-1] for line in open("/proc/self/maps") if "psikv" in line}, flush=True)
sys.stdin.readline()
"""


KEPT = {name: value for name, value in os.environ.items() if name not in {"CC", "PYTHONPATH"}}


def run(*command: str | Path, check: bool = True, **environment: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [str(word) for word in command],
        capture_output=True,
        text=True,
        check=False,
        timeout=FETCH_S,
        cwd=ROOT,
        env={**KEPT, **environment},
    )
    if check:
        assert done.returncode == 0, done.stdout + done.stderr
    return done


def _into(environment: Path) -> tuple[str | Path, ...]:
    """pip for a fresh environment: one of its own would take three seconds."""
    run(sys.executable, "-m", "venv", "--without-pip", environment)
    return (sys.executable, "-m", "pip", "--python", environment / "bin/python")


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> tuple[Path, dict[str, str]]:
    """`psi-kv` in a fresh environment, and the variables of a machine on which nothing can be compiled."""
    folder = tmp_path_factory.mktemp("bare")
    # What is compiled of numpy by pip, for 4 s, is not what is used of it.
    run(*_into(folder / "venv"), "install", "--disable-pip-version-check", "--no-compile", wheel)
    files = (path for path in (folder / "venv").rglob("site-packages/**/*") if path.is_file())
    assert sum(path.lstat().st_size for path in files) < MOST_INSTALLED_BYTES
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


def test_the_wheels_that_are_published_run_on_an_old_glibc_and_load(tmp_path):
    run(ROOT / "scripts/build_wheels.sh", PYTHON=sys.executable, OUT=str(tmp_path))
    names = sorted(path.name.split("-py3-none-")[1] for path in tmp_path.glob("*.whl"))
    assert [name.rsplit(".", 2)[1] for name in names] == [f"manylinux_2_17_{one}" for one in MACHINES]
    (own,) = tmp_path.glob(f"*{platform.machine()}.whl")
    agent = zipfile.ZipFile(own).extract("psi_kv_governor/engines/llama/libpsikv_agent.so", tmp_path)
    run(sys.executable, "-c", "import ctypes, os, sys; ctypes.CDLL(sys.argv[1], os.RTLD_NOW)", agent)


def test_an_install_that_is_worked_on_compiles_on_first_use(tmp_path):
    run(*_into(tmp_path / "venv"), "install", "--no-deps", "--editable", ".")
    assert not list((tmp_path / "venv").rglob("*.so"))
    assert not list((ROOT / "src").rglob("libpsikv_agent.so"))


def test_without_a_compiler_doctor_says_that_none_is_needed(installed):
    psi_kv, bare = installed
    told = run(psi_kv, "doctor", check=False, **bare)
    assert "the agent came compiled" in told.stdout
    assert "site-packages/psi_kv_governor/engines/llama/libpsikv_agent.so" in told.stdout
    assert "Traceback" not in told.stderr


def test_simulate_needs_nothing_else(installed):
    psi_kv, bare = installed
    told = run(psi_kv, "simulate", **bare)
    assert "trim" in told.stdout


def test_without_a_compiler_exec_runs_a_program_and_ends_as_it_ends(installed):
    psi_kv, bare = installed
    done = run(psi_kv, "exec", "--", "sh", "-c", "exit 7", check=False, **bare)
    assert done.returncode == 7
    assert "ungoverned" not in done.stderr


@pytest.mark.llama
def test_without_a_compiler_exec_governs_a_program_of_another_environment(installed, demo_model):
    psi_kv, bare = installed
    pipe = subprocess.PIPE
    with subprocess.Popen(
        [psi_kv, "exec", "--", sys.executable, "-c", GOVERNED, demo_model],
        cwd=ROOT, env={**KEPT, **bare}, stdin=pipe, stdout=pipe, stderr=pipe, text=True,
    ) as program:  # fmt: skip
        # Of so short a program its governor may else not hear in time.
        until(lambda: program.poll() is not None or servers.sees_a_cache(program.pid), "no cache is seen")
        out, said = program.communicate("\n", timeout=PATIENCE_S)
    assert program.returncode == 0, said
    assert str(psi_kv.parents[1]) in out
    assert "libpsikv_agent.so" in out
    assert "opened no llama.cpp cache" not in said


@pytest.mark.llama
def test_without_a_compiler_exec_governs_a_llama_server(installed, demo_model):
    psi_kv, bare = installed
    try:
        server = servers.debian_server()
    except Unavailable as error:
        pytest.skip(f"Debian's llama-server can't be had: {error}")
    words = [
        *server,
        "-m",
        str(demo_model),
        "-c",
        "4096",
        "-t",
        "1",
        "--port",
        str(servers.free_port()),
        "--no-webui",
    ]
    began = subprocess.Popen(
        [psi_kv, "exec", "--", *words], env={**bare, "HOME": str(psi_kv.parents[2])},
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        for _ in range(600):
            told = run(psi_kv, "status", str(began.pid), "--json", check=False, **bare).stdout
            if '"cell_bytes"' in told:  # a cache, and so the agent in the server
                break
            assert began.poll() is None, began.stderr.read()
            time.sleep(0.2)
        assert '"cell_bytes"' in told
    finally:
        began.terminate()
        _, said = began.communicate(timeout=PATIENCE_S)
    assert "ungoverned" not in said


@pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="there is no dpkg-deb: apt install dpkg")
def test_the_debian_package_has_the_command_the_agent_the_unit_and_the_pages(wheel, tmp_path):
    run(sys.executable, ROOT / "scripts/build_deb.py", wheel, tmp_path)
    (package,) = tmp_path.glob("*.deb")
    fields = run("dpkg-deb", "--field", package).stdout
    assert "python3-click (>= 8.1)" in fields
    assert "Architecture: " + run("dpkg", "--print-architecture").stdout in fields
    run("dpkg-deb", "--extract", package, tmp_path / "root")
    root = tmp_path / "root/usr"
    for path in (
        "lib/python3/dist-packages/psi_kv_governor/engines/llama/libpsikv_agent.so",
        "lib/systemd/system/psi-kv@.service",
        "share/man/man1/psi-kv-exec.1.gz",
        "share/man/man5/psi-kv.toml.5.gz",
        "share/doc/psi-kv-governor/examples/ollama.service.d/psi-kv.conf",
    ):
        assert (root / path).is_file(), path
    done = run(sys.executable, root / "bin/psi-kv", "exec", "--dry-run", "--", "true",
               PYTHONPATH=str(root / "lib/python3/dist-packages"))  # fmt: skip
    assert str(root / "lib/python3/dist-packages/psi_kv_governor") in done.stdout
