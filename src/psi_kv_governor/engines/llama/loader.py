"""Puts the agent in front of llama.cpp in this process."""

from __future__ import annotations

import ctypes
import functools
import importlib
import importlib.util
import os
import shutil
import sys
import tempfile
from pathlib import Path

from psi_kv_governor.engines.llama.elf import redirecting
from psi_kv_governor.errors import EngineError
from psi_kv_governor.native.building import agent_path, folders

INSTALL_HINT = "pip install 'psi-kv-governor[llama]'"


def llama_cpp_version() -> str:
    """The version of llama-cpp-python. Raises EngineError where it is not installed."""
    from importlib import metadata  # 1.7 MB with what it imports, for doctor alone

    try:
        return metadata.version("llama-cpp-python")
    except metadata.PackageNotFoundError:
        raise EngineError(f"llama-cpp-python is not installed: {INSTALL_HINT}") from None


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
    for parent in [None, *folders()]:  # None: the folder for temporary files, which may be mounted noexec
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
