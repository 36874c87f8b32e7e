"""Where a service may do little, a model does as much as without us: the real thing, each in a child."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from calm import CALM
from gguf_models import LARGE, write_model
from psi_kv_governor.kernel.filters import _CALLS
from psi_kv_governor.native import building
from psi_kv_governor.native.compiling import compile_command
from psikv_bench.survival import filtered
from warm import Warm

pytestmark = [
    pytest.mark.llama,
    pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="mounts, other users: root"),
]

MODEL = """
import logging, os, sys
logging.basicConfig(level=logging.INFO)
{before}
if sys.argv[2] == "plain":
    from llama_cpp import Llama as kind
else:
    from psi_kv_governor import GovernedLlama as kind
llm = kind(sys.argv[1], n_ctx=2048, n_threads=1, n_threads_batch=1, verbose=False, flash_attn=True)
ids = [i % 240 + 5 for i in range(700)]
llm.eval(ids)
answer = []
for _ in range(8):
    token = int(llm.scores[llm.n_tokens - 1].argmax()) if llm._logits_all else llm.sample(temp=0.0)
    answer.append(token)
    llm.eval([token])
print("answer", answer)
if sys.argv[2] != "plain":
    result = llm.governor.trim(1.0)
    print("returned", result.bytes_returned, result.problem or llm.governor.engine.describe().place)
    llm.governor.restore()
llm.close()
"""


COMPILER = Path(__file__).with_name("quick-cc")


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder that other users can enter and write to: pytest's are closed to them."""
    path = Path(tempfile.mkdtemp(prefix="psi-kv-hardened-", dir="/var/tmp"))
    path.chmod(0o1777)
    yield path
    shutil.rmtree(path)


@pytest.fixture(scope="module")
def compiled() -> Iterator[Path]:
    """The agent, where any user can read it: each of these would compile it anew, for two seconds."""
    target = Path(f"/var/tmp/psi-kv-hardened-{os.getpid()}.so")
    subprocess.run(compile_command([str(COMPILER)], str(target)), check=True, timeout=800)
    target.chmod(0o644)
    yield target
    target.unlink()


def answer_in(said: str) -> str:
    return next(line for line in said.splitlines() if line.startswith("answer"))


@pytest.fixture(scope="module")
def under(tmp_path_factory, compiled) -> Iterator[Callable[..., str]]:
    """Runs the model, `plain` or `governed`, under a filter, in a process that has imported everything but
    llama.cpp; gives all that it says. It must not fail."""
    home = tmp_path_factory.mktemp("home")
    model = write_model(home / "tiny.gguf", LARGE)
    environ = {"PATH": os.environ["PATH"], "HOME": str(home), "TMPDIR": str(home), **CALM}
    environ |= {"CC": str(COMPILER), "QUICK_CC": str(compiled)}
    with Warm(
        "psi_kv_governor.governor", "psi_kv_governor.engines.llama.fleet", "jinja2", "diskcache"
    ) as warm:

        def run(kind: str, *deny: str, how: filtered.How = "kill") -> str:
            code, words = MODEL.format(before=""), (str(model), kind)
            done = warm.run(code, words, home, cwd=home, environ=environ, deny=deny, how=how)
            assert done.returncode == 0, done.stderr[-2000:]
            assert "Traceback" not in done.stderr
            return done.stdout + done.stderr

        yield run


@pytest.fixture(scope="module")
def plain_answer(under) -> str:
    return answer_in(under("plain"))


@pytest.fixture
def governed(folder, compiled, plain_answer) -> Callable[..., str]:
    """Runs the governed model in other surroundings, in which it must not fail and answers as without us;
    gives all that it says."""
    model = write_model(folder / "tiny.gguf", LARGE)
    model.chmod(0o644)

    def run(
        wrap: Callable[[list[str]], list[str]] = lambda argv: argv,
        before: str = "",
        environ: dict[str, str] | None = None,
    ) -> str:
        usual = {"HOME": str(folder), "TMPDIR": str(folder), "OPENBLAS_NUM_THREADS": "1"}
        usual |= {"CC": str(COMPILER), "QUICK_CC": str(compiled), **CALM}
        done = subprocess.run(
            wrap([sys.executable, "-c", MODEL.format(before=before), str(model), "governed"]),
            capture_output=True, text=True, check=False, timeout=800, cwd="/",
            env={"PATH": os.environ["PATH"], **usual, **(environ or {})},
        )  # fmt: skip
        assert done.returncode == 0, (done.returncode, done.stderr[-2000:])
        assert "Traceback" not in done.stderr
        assert answer_in(done.stdout) == plain_answer
        return done.stdout + done.stderr

    return run


def as_nobody(argv: list[str], user: int = 54321) -> list[str]:
    """A user number without name, home or group, as a container platform gives out."""
    return ["setpriv", "--reuid", str(user), "--regid", "0", "--clear-groups", *argv]


def in_mounts(*commands: str) -> Callable[[list[str]], list[str]]:
    """In a mount namespace of its own, in which `commands` were run."""
    script = " && ".join((*commands, 'exec "$@"'))
    return lambda argv: ["unshare", "-m", "--propagation", "private", "sh", "-c", script, "sh", *argv]


def service_calls() -> list[str]:
    """What @system-service allows, by systemd's own word, with the sets that it names."""
    listed = subprocess.run(
        ["systemd-analyze", "syscall-filter"], capture_output=True, text=True, check=False
    )
    if listed.returncode:
        pytest.skip("there is no systemd-analyze here: apt install systemd")
    sets: dict[str, list[str]] = {}
    for line in listed.stdout.splitlines():
        word = line.strip()
        if line.startswith("@"):
            sets[word] = members = []
        elif word and not word.startswith("#"):
            members.append(word)

    def of(name: str) -> list[str]:
        return [call for one in sets[name] for call in (of(one) if one.startswith("@") else [one])]

    return of("@system-service")


def test_under_the_filter_of_a_hardened_service_it_is_governed_and_lives(governed):
    """@system-service, which has no mincore: systemd's default is to kill."""
    calls = service_calls()
    assert "mincore" not in calls
    # Newer than this systemd's list, and used by every program of this libc.
    calls += ["clone3", "rseq", "faccessat2", "statx"]
    said = governed(  # and compiles its agent under it
        wrap=lambda argv: filtered.command(argv, allow=calls), environ={"QUICK_CC": ""}
    )
    assert int(said.partition("returned ")[2].split()[0]) > 1 << 20


def test_where_mincore_is_refused_bytes_are_counted_otherwise(governed):
    said = governed(wrap=lambda argv: filtered.command(argv, deny=["mincore"], how="refuse"))
    assert int(said.partition("returned ")[2].split()[0]) > 1 << 20
    assert "stayed resident" not in said


# Not what starts a process: neither does a model that only decodes.
REFUSED = sorted({*_CALLS, "fadvise64", "pwrite64", "cachestat", "inotify_init1", "statfs", "pipe2", "vfork"})


KILLED = ("bind", "chmod", "epoll_ctl", "fallocate", "flock", "poll", "pwrite64", "sendto")


@pytest.mark.slow
@pytest.mark.parametrize("name", REFUSED)
def test_whatever_a_filter_refuses_the_model_answers_as_without_us(under, plain_answer, name):
    assert answer_in(under("governed", name, how="refuse")) == plain_answer


@pytest.mark.slow
@pytest.mark.parametrize("name", KILLED)
def test_a_filter_that_kills_for_what_only_the_governor_calls_leaves_the_model_alone(
    under, plain_answer, name
):
    said = under("governed", name)
    assert answer_in(said) == plain_answer
    assert "seccomp filter kills for" in said


def test_a_random_user_without_home_or_name_is_governed(governed, folder):
    said = governed(wrap=as_nobody, environ={"HOME": "/", "TMPDIR": str(folder)})
    assert "psi-kv-54321" in said or "place" in said


def test_with_the_service_manager_s_folders_nothing_else_is_needed(governed, folder):
    """DynamicUser=, ProtectHome=, CacheDirectory=: no home, and folders that can't be entered."""
    for name in ("cache", "state", "runtime"):
        (folder / name).mkdir()
        os.chown(folder / name, 54321, 0)
    hidden = in_mounts("mount -t tmpfs -o mode=0000 none /root", "mount -t tmpfs -o mode=0000 none /run")
    given = {f"{name.upper()}_DIRECTORY": str(folder / name) for name in ("cache", "state", "runtime")}
    python = Path(sys.executable).resolve()
    if Path("/root") in python.parents:
        hidden = in_mounts("mount -t tmpfs -o mode=0000 none /run")
    said = governed(
        wrap=lambda argv: hidden(as_nobody(argv)),
        before="import atexit; atexit.register(lambda: print(os.listdir(os.environ['RUNTIME_DIRECTORY'])))",
        environ={**given, "HOME": "/nonexistent", "XDG_RUNTIME_DIR": "/run/user/54321"},
    )
    assert "['psi-kv']" in said
    assert str(folder / "cache") in said or "place" in said
    assert not (Path("/") / "~").exists()


def test_on_a_read_only_root_without_any_folder_it_runs(governed):
    said = governed(
        wrap=in_mounts("mount -o remount,ro,bind /", "mount -o remount,ro,bind /dev/shm"),
        environ={"HOME": "/nonexistent"},
    )
    assert "Read-only file system" in said or "returned" in said


def test_where_every_folder_is_noexec_it_runs_and_says_so(governed, folder):
    """The agent and what leads to it are libraries: nothing can be loaded from a folder mounted noexec."""
    (folder / "native").mkdir()
    noexec = "mount -t tmpfs -o noexec,mode=1777 none"
    said = governed(
        wrap=in_mounts(f"{noexec} /dev/shm", f"{noexec} {folder}/native"),
        environ={"HOME": f"{folder}/native", "TMPDIR": "/dev/shm"},
    )
    if not building.shipped():
        assert "noexec" in said
        assert "PSIKV_NATIVE_DIR" in said


def test_a_temporary_folder_mounted_noexec_alone_is_no_obstacle(governed, folder):
    noexec = "mount -t tmpfs -o noexec,mode=1777 none"
    home = Path(tempfile.mkdtemp(prefix="psi-kv-test-", dir="/var/tmp"))
    try:
        said = governed(
            wrap=in_mounts(f"{noexec} /dev/shm"), environ={"TMPDIR": "/dev/shm", "HOME": str(home)}
        )
    finally:
        shutil.rmtree(home)
    assert int(said.partition("returned ")[2].split()[0]) > 0


def test_without_a_compiler_it_runs_and_says_so(governed, folder):
    said = governed(environ={"CC": "no-such-compiler", "HOME": str(folder / "fresh")})
    if not building.shipped():
        assert "no C compiler found" in said


def test_an_agent_that_root_built_into_an_image_serves_any_user_without_a_compiler(governed, folder):
    image = folder / "image"
    image.mkdir(mode=0o755)
    build = "from psi_kv_governor.native.building import agent_path; print(agent_path())"
    environ = {
        "PATH": os.environ["PATH"], "PSIKV_NATIVE_DIR": str(image), "HOME": str(folder), "CC": str(COMPILER),
    }  # fmt: skip
    subprocess.run([sys.executable, "-c", build], env=environ, check=True)
    said = governed(
        wrap=as_nobody,
        environ={
            "PSIKV_NATIVE_DIR": str(image),
            "CC": "no-such-compiler",
            "TMPDIR": str(folder),
            "HOME": "/",
        },
    )
    assert int(said.partition("returned ")[2].split()[0]) > 0


@pytest.mark.parametrize("limit", ["--nproc=1:1", "--nofile=48:48", "--memlock=0:0", "--fsize=0:0"])
def test_under_a_tight_limit_of_the_unit_it_runs(governed, folder, limit):
    """TasksMax=1: no thread of ours. LimitNOFILE=, LimitFSIZE=: no file."""
    own = 20_000 + os.getpid() % 30_000  # of one's processes all count, also those of a test beside this one
    governed(
        wrap=lambda argv: ["prlimit", limit, *as_nobody(argv, own)],
        environ={"TMPDIR": str(folder), "HOME": "/"},
    )
