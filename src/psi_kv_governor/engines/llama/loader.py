"""Finds or compiles the agent, and puts it in front of llama.cpp in this process."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import importlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

from psi_kv_governor.engines.llama.compiling import FLAGS, SOURCE_DIR, compile_command
from psi_kv_governor.engines.llama.elf import redirecting
from psi_kv_governor.errors import EngineError
from psi_kv_governor.kernel.filters import killing_calls
from psi_kv_governor.user_folders import cache_folder

INSTALL_HINT = "pip install 'psi-kv-governor[llama]'"
_SHIPPED = Path(__file__).with_name("libpsikv_agent.so")
"""In a wheel of a platform the agent comes compiled."""


def compiler() -> str:
    """The C compiler: $CC, or the first of cc, gcc, clang. Raises EngineError."""
    wanted = os.environ.get("CC", "").split()[:1]
    for name in wanted or ("cc", "gcc", "clang"):
        if found := shutil.which(name):
            return found
    named = f"$CC ({wanted[0]})" if wanted else "cc, gcc or clang"
    raise EngineError(f"no C compiler found ({named}): install one, for instance 'apt install gcc libc6-dev'")


def agent_path() -> Path:
    """The agent for this machine, compiled now if need be. Raises EngineError."""
    if sys.platform != "linux":
        raise EngineError(f"no memory can be returned on {sys.platform}: the agent needs Linux")
    if killing := killing_calls():
        raise EngineError(
            f"a seccomp filter kills for what the governor calls ({', '.join(killing)}): allow it (in a unit "
            "SystemCallFilter=@system-service), or have the filter refuse (SystemCallErrorNumber=EPERM)"
        )
    if _SHIPPED.is_file():
        return _SHIPPED
    try:
        digest = hashlib.sha256("\0".join((*FLAGS, platform.machine(), platform.libc_ver()[0])).encode())
    except OSError as error:  # platform asks uname, which a filter may refuse
        raise EngineError(f"what machine this is can't be asked: {error}") from error
    try:
        for part in sorted(SOURCE_DIR.glob("*.[ch]")):
            digest.update(part.name.encode() + part.read_bytes())
    except OSError as error:
        raise EngineError(f"the agent's source can't be read: {error}") from error
    name = f"psikv-agent-{digest.hexdigest()[:24]}.so"
    folders = _folders()
    for folder in folders:  # one that is there, for instance built into an image, needs no compiler
        with contextlib.suppress(OSError):
            _check(folder)
            _check(folder / name)
            return folder / name
    problems: list[str] = []
    for folder in folders:
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o755)
            _check(folder)
            if not (folder / name).is_file():
                _compile(folder / name)
            _check(folder / name)
        except OSError as error:
            problems.append(f"{folder}: {error.strerror or error}")
            continue
        return folder / name
    raise EngineError(
        f"the compiled agent has no place ({'; '.join(problems)}): set PSIKV_NATIVE_DIR to a folder that is "
        "yours, on a mount that is writable and not noexec"
    )


def is_agent(path: str) -> bool:
    """Whether that library is an agent, of whatever version, by its name."""
    return re.fullmatch(r"psikv-agent-[0-9a-f]+\.so|libpsikv_agent\.so", Path(path).name) is not None


def shipped() -> bool:
    """Whether the agent came compiled with this package."""
    return _SHIPPED.is_file()


def llama_cpp_version() -> str:
    """The version of llama-cpp-python. Raises EngineError where it is not installed."""
    try:
        return importlib.metadata.version("llama-cpp-python")
    except importlib.metadata.PackageNotFoundError:
        raise EngineError(f"llama-cpp-python is not installed: {INSTALL_HINT}") from None


def _folders() -> list[Path]:
    """Where a compiled agent may be kept, best first. None of them need exist, or be usable."""
    named = [Path(value) for value in [os.environ.get("PSIKV_NATIVE_DIR", "")] if value]
    service = [
        Path(value.partition(":")[0]) / "psi-kv-native"
        for value in map(os.environ.get, ("CACHE_DIRECTORY", "STATE_DIRECTORY"))
        if value
    ]
    home: list[Path] = []
    with contextlib.suppress(RuntimeError, KeyError, OSError):  # no HOME and no passwd entry
        home = [path for path in [cache_folder() / "native"] if path.is_absolute()]
    for_all: list[Path] = []
    with contextlib.suppress(FileNotFoundError):  # no folder can be written to at all
        for_all = [Path(tempfile.gettempdir()) / f"psi-kv-native-{os.getuid()}"]
    return [*named, *service, *home, *for_all]


def _check(path: Path) -> None:
    """Raises OSError where somebody else could put a library, or nothing can be loaded from there."""
    status = path.lstat()
    if stat.S_ISLNK(status.st_mode):
        raise PermissionError(0, f"{path.name} is a link")
    if status.st_uid not in {0, os.getuid()}:  # root's: built into an image, and run by any user
        raise PermissionError(0, f"{path.name} belongs to another user")
    if status.st_mode & 0o022:
        raise PermissionError(0, f"others may write to {path.name}: chmod go-w")
    if os.statvfs(path).f_flag & os.ST_NOEXEC:
        raise PermissionError(0, "it is mounted noexec, so no library can be loaded from there")


def _compile(target: Path) -> None:
    """Raises EngineError where there is no compiler, OSError where nothing can be written."""
    # A private name first: two processes may compile at once, and neither may load half a file.
    descriptor, name = tempfile.mkstemp(dir=target.parent, suffix=".so")
    os.close(descriptor)
    built = Path(name)
    words = os.environ.get("CC", "").split()[1:]
    try:
        done = subprocess.run(
            compile_command([compiler(), *words], name),
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            first = next((line for line in done.stderr.splitlines() if "error" in line), "no message")
            raise EngineError(f"compiling the agent failed ({first.strip()}): is a C library installed?")
        built.chmod(0o555)  # also by others: built by root into an image
        built.replace(target)
    finally:
        built.unlink(missing_ok=True)


class Agent:
    """The agent in this process."""

    def __init__(self, path: Path, library: Path | None) -> None:
        """`library` is the llama.cpp that stands behind it. Raises OSError."""
        # Global, and before any library that needs llama.cpp: what llama.cpp calls in ggml, and what others
        # call in llama.cpp, is looked for here first.
        loaded = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
        self.serve = loaded.psikv_serve
        self.serve.restype = ctypes.c_int64
        self.serve.argtypes = (ctypes.c_char_p, ctypes.c_int64, ctypes.c_void_p, ctypes.c_int64)
        self._configure = loaded.psikv_configure
        self._configure.restype = None
        self._configure.argtypes = (
            ctypes.c_char_p, ctypes.c_int32, ctypes.c_uint64, ctypes.c_uint64, ctypes.c_char_p,
        )  # fmt: skip
        self._library = str(library or "").encode()

    def configure(self, place: str, *, in_file: bool, reserve_bytes: int, limit_bytes: int) -> None:
        """Where the caches that are opened from now on are born, and where ranges are parked."""
        self._configure(place.encode(), int(in_file), reserve_bytes, limit_bytes, self._library)


class Loaded:
    """What came of putting the agent in the way."""

    def __init__(self, agent: Agent | None, why: str) -> None:
        self.agent = agent
        self.why = why
        """Why there is none, and what to do; '' where it is there."""


@functools.cache
def load() -> Loaded:
    """Put the agent in front of llama.cpp and import `llama_cpp` behind it. Raises nothing of ours; what
    `import llama_cpp` raises without us goes through."""
    if "llama_cpp" in sys.modules:
        return Loaded(
            None,
            "llama_cpp was imported before psi_kv_governor, so its caches can't be governed: import "
            "psi_kv_governor.auto first, or start the program with 'psi-kv exec -- python ...'",
        )
    before = os.environ.get("LLAMA_CPP_LIB_PATH")
    agent, folder, why = None, None, ""
    try:
        library = llama_cpp_library(before)
        path = agent_path()
        agent = Agent(path, library)
        folder = _in_front(path, library)
        os.environ["LLAMA_CPP_LIB_PATH"] = str(folder)
        importlib.import_module("llama_cpp")
    except (EngineError, NotImplementedError) as error:
        agent, why = None, str(error)
    except Exception as error:  # ours is in its way, or there is none to be imported: that shows below
        agent, why = None, f"the agent can't be put in front of llama.cpp: {' '.join(str(error).split())}"
        for name in [name for name in sys.modules if name.partition(".")[0] == "llama_cpp"]:
            del sys.modules[name]
    finally:
        os.environ.pop("LLAMA_CPP_LIB_PATH", None)
        if before is not None:
            os.environ["LLAMA_CPP_LIB_PATH"] = before
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
    importlib.import_module("llama_cpp")
    return Loaded(agent, why)


def _in_front(agent: Path, library: Path) -> Path:
    """A new folder with a library of `library`'s name that leads to the agent first. Raises OSError."""
    problems = []
    for parent in [None, *_folders()]:  # None: the folder for temporary files, which may be mounted noexec
        folder = None
        try:
            folder = Path(tempfile.mkdtemp(prefix="psi-kv-", dir=parent))
            if os.statvfs(folder).f_flag & os.ST_NOEXEC:
                raise PermissionError(0, f"{folder} is mounted noexec")
            (folder / library.name).write_bytes(redirecting([agent, library]))
        except OSError as error:
            problems.append(error.strerror or str(error))
            if folder is not None:
                shutil.rmtree(folder, ignore_errors=True)
        else:
            return folder
    raise OSError(0, "; ".join(problems))


def llama_cpp_library(folder: str | None = None) -> Path:
    """The libllama that llama-cpp-python would load. Raises EngineError."""
    if folder is None:
        spec = importlib.util.find_spec("llama_cpp")
        if spec is None or spec.origin is None:
            raise EngineError(f"llama-cpp-python is not installed: {INSTALL_HINT}")
        folder = str(Path(spec.origin).parent / "lib")
    library = Path(folder).resolve() / "libllama.so"
    if not library.is_file():
        raise EngineError(f"{library} is not there: is llama-cpp-python installed whole?")
    return library
