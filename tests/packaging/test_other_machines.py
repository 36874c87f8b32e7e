"""The agent for aarch64, compiled as for the wheel, run on that machine: by qemu, with Debian's C library."""

from __future__ import annotations

import shutil
import subprocess
import sys
from fcntl import LOCK_EX, flock
from pathlib import Path

import pytest
from platformdirs import user_cache_path

from packages_help import FETCH_S
from psi_kv_governor.native.compiling import compile_command

ROOT = Path(__file__).parents[2]
KEY = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
CACHE = user_cache_path("psi-kv") / "test-servers" / "debian-arm64"
NAMES = "void __gcc_personality_v0(void) {} void _Unwind_Resume(void) {}"
"""What scripts/build_wheels.sh links the agent with instead of libgcc_s."""
LOADS = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
int main(int n, char ** words) {
    void * agent = dlopen(words[1], RTLD_NOW | RTLD_GLOBAL);
    if (!agent) { puts(dlerror()); return 1; }
    Dl_info where;
    void *  hook = dlsym(agent, "llama_decode");
    if (!hook || !dladdr(hook, &where)) return 2;
    printf("llama_decode is in %s\n", strrchr(where.dli_fname, '/') + 1);
    int64_t (*serve)(const void *, int64_t, void *, int64_t) = dlsym(agent, "psikv_serve");
    char answer[64];
    printf("nonsense is answered with %lld\n", (long long) serve("nonsense", 8, answer, sizeof(answer)));
    char * memory;
    if (posix_memalign((void **) &memory, 64, 8 << 20)) return 3;
    memset(memory, 0, 8 << 20);
    memset(memory, 7, 4096);
    int sum = 0;
    for (int at = 0; at < 8 << 20; ++at) sum += memory[at];
    printf("memory holds %d\n", sum);
    return 0;
}
"""

pytestmark = pytest.mark.slow


def run(*command: str | Path, **options: object) -> str:
    done = subprocess.run(
        [str(word) for word in command],
        capture_output=True,
        text=True,
        check=False,
        timeout=FETCH_S,
        **options,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def c_library() -> Path:
    """A root with Debian's C library for aarch64."""
    if shutil.which("apt-get") is None or not KEY.is_file():
        pytest.skip("Debian's C library for aarch64 can't be had: there is no apt with Debian's keys")
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / "lock").open("w") as lock:
        flock(lock, LOCK_EX)
        root = CACHE / "root"
        if not root.is_dir():
            try:
                fetch(CACHE)
            except AssertionError as error:
                pytest.skip(f"Debian's C library for aarch64 can't be had: {str(error).splitlines()[0]}")
        return root


def fetch(folder: Path) -> None:
    """Its packages, unpacked: apt on this machine is not touched."""
    for part in ("etc/apt/apt.conf.d", "etc/apt/preferences.d", "lists/partial", "archives/partial"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    (folder / "status").touch()
    sources = "\n".join(
        path.read_text() for path in Path("/etc/apt").glob("sources.list*/*.sources") if path.is_file()
    )
    (folder / "etc/apt/machine.sources").write_text(sources)
    (folder / "etc/apt/sources.list.d").mkdir(exist_ok=True)
    shutil.copy(folder / "etc/apt/machine.sources", folder / "etc/apt/sources.list.d/machine.sources")
    config = folder / "apt.conf"
    config.write_text(
        f'Dir::Etc "{folder}/etc/apt";\nDir::State::status "{folder}/status";\n'
        f'Dir::State::lists "{folder}/lists";\nDir::Cache::archives "{folder}/archives";\n'
        'APT::Architecture "arm64";\nAPT::Architectures "arm64";\nAPT::Sandbox::User "";\n'
        'Acquire::Check-Valid-Until "false";\n'
    )
    apt = ("env", f"APT_CONFIG={config}", "apt-get", "--quiet")
    run(*apt, "update")
    run(*apt, "download", "libc6", "libgcc-s1", cwd=folder)
    for deb in folder.glob("*.deb"):
        run("dpkg-deb", "-x", deb, folder / "unpacked")
    (folder / "unpacked").rename(folder / "root")


def test_the_agent_for_aarch64_loads_and_runs_there(c_library, tmp_path):
    qemu = shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")
    if qemu is None:
        pytest.skip("there is no qemu for aarch64: apt install qemu-user-static")
    compiler = [sys.executable, "-m", "ziglang", "cc", "-target", "aarch64-linux-gnu.2.17"]
    names, agent, program = tmp_path / "names.so", tmp_path / "libpsikv_agent.so", tmp_path / "loads"
    (tmp_path / "names.c").write_text(NAMES)
    (tmp_path / "loads.c").write_text(LOADS)
    run(*compiler, "-shared", "-fPIC", "-Wl,-soname,libgcc_s.so.1", "-o", names, tmp_path / "names.c")
    run(*compile_command([*compiler, str(names), "-Wl,-z,defs"], str(agent)))
    run(*compiler, "-O2", tmp_path / "loads.c", "-o", program, "-ldl")
    told = run(qemu, "-L", c_library, program, agent)
    assert told.splitlines() == [
        "llama_decode is in libpsikv_agent.so",
        "nonsense is answered with 0",
        f"memory holds {7 * 4096}",
    ]
    preloaded = run(qemu, "-L", c_library, "-E", f"LD_PRELOAD={agent}", program, agent)
    assert preloaded == told
