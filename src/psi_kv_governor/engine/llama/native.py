"""Compiles, caches and loads the native library (the tap and the scores), before llama.cpp itself is loaded.

It is compiled on first use against the ggml headers that llama-cpp-python installed next to its
library, so the layout of `struct ggml_tensor` is right by construction, and cached under the hash of all
that went into it. Loading it first and with RTLD_GLOBAL lets its `ggml_backend_buffer_clear` take
precedence over libggml-base's, which makes every KV cache of the process demand-paged.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from platformdirs import user_cache_path

from psi_kv_governor.errors import EngineError

INSTALL_HINT = "pip install 'psi-kv-governor[llama]'"
_SOURCES = tuple(Path(__file__).with_name(name) for name in ("tap.c", "keys.c", "attention.c"))
_OWN_HEADERS = tuple(Path(__file__).with_name(name) for name in ("tap.h", "values.h"))
_HEADERS = ("ggml.h", "ggml-backend.h", "ggml-alloc.h")
# Sums may be taken in any order, so that they are taken 8 or 16 at a time. Not -ffast-math: linked with it, a
# library makes the whole process flush subnormals to zero, and llama.cpp's logits would change.
_SUMS = ("-fassociative-math", "-fno-signed-zeros", "-fno-trapping-math", "-fno-math-errno")
_FLAGS = ("-O3", "-shared", "-fPIC", "-fvisibility=hidden", *_SUMS)
# It is compiled on the machine that runs it. On x86 vectors of 256 bits: a head's values are written and read
# again at once, and a read that is wider than the writes waits for them (5 times slower for q8_0).
_X86 = ("-mprefer-vector-width=256",) if platform.machine() in {"x86_64", "AMD64"} else ()
_TUNED = ("-march=native", *_X86)


class TensorInfo(ctypes.Structure):
    """`struct psikv_tensor` of tap.c: one tensor of the cache."""

    _fields_ = (
        ("name", ctypes.c_char * 64),
        ("base", ctypes.c_uint64),
        ("row_bytes", ctypes.c_uint64),
        ("rows", ctypes.c_uint64),
        ("type", ctypes.c_int32),
        ("host", ctypes.c_int32),
        ("contiguous", ctypes.c_int32),
        ("head_dim", ctypes.c_int32),
        ("index_source", ctypes.c_uint64),
        ("n_head", ctypes.c_int32),
        ("alibi", ctypes.c_int32),
        ("sampled", ctypes.c_int32),
        ("reserved", ctypes.c_int32),
    )


@functools.cache
def llama_cpp_package() -> Path:
    """Folder of the installed llama_cpp package, found without importing it. Raises EngineError."""
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None or not spec.submodule_search_locations:
        raise EngineError(f"llama-cpp-python is not installed: {INSTALL_HINT}")
    return Path(spec.submodule_search_locations[0])


def library_version() -> str:
    """Version of llama-cpp-python, for blob tags and reports."""
    return "llama-cpp-python " + importlib.metadata.version("llama-cpp-python")


def header_dir() -> Path:
    """Folder with the ggml headers of the installed library. Raises EngineError."""
    package = llama_cpp_package()
    for folder in (package.parent / "include", package / "include", Path(sys.prefix) / "include"):
        if all((folder / name).is_file() for name in _HEADERS):
            return folder
    raise EngineError(f"the ggml headers are not beside {package}: reinstall llama-cpp-python with pip")


def compiler() -> str:
    """The C compiler: $CC, or the first of cc, gcc, clang. Raises EngineError."""
    wanted = _cc()[:1]
    for name in wanted or ("cc", "gcc", "clang"):
        if found := shutil.which(name):
            return found
    named = f"$CC ({wanted[0]})" if wanted else "cc, gcc or clang"
    raise EngineError(f"no C compiler found ({named}): install one, for instance 'apt install gcc libc6-dev'")


def _cc() -> list[str]:
    """The words of $CC, which may name a compiler with arguments, as make takes it ('gcc -m64')."""
    return os.environ.get("CC", "").split()


def library_path() -> Path:
    """The compiled tap for the installed llama.cpp, compiled now if need be. Raises EngineError."""
    if sys.platform == "win32":
        raise EngineError("no memory can be returned on Windows, which lacks mmap, mincore and dlopen")
    headers = header_dir()
    digest = hashlib.sha256("\0".join((*_FLAGS, *_TUNED, platform.machine(), _processor())).encode())
    for part in (*_SOURCES, *_OWN_HEADERS, *(headers / name for name in _HEADERS)):
        digest.update(part.read_bytes())
    target = user_cache_path("psi-kv") / "native" / f"tap-{digest.hexdigest()[:24]}.so"
    if not target.is_file():
        _compile(headers, target)
    return target


def _processor() -> str:
    """What this processor can do: a home folder may be shared with machines that can do less."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("flags", "Features", "isa")):
                return line
    return ""


def _compile(headers: Path, target: Path) -> None:
    try:
        target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        # A private name first: two processes may compile at once, and neither may load half a file.
        descriptor, name = tempfile.mkstemp(dir=target.parent, suffix=".so")
        os.close(descriptor)
    except OSError as error:
        raise EngineError(f"cannot write the compiled tap to {target.parent}: {error.strerror}") from error
    built = Path(name)
    try:
        command = [
            compiler(),
            *_cc()[1:],
            *_FLAGS,
            f"-I{headers}",
            *map(str, _SOURCES),
            "-o",
            name,
            "-ldl",
            "-lm",
        ]
        done = _run([*command, *_TUNED])
        if done.returncode != 0:
            done = _run(command)
        if done.returncode != 0:
            first = next((line for line in done.stderr.splitlines() if "error" in line), "no message")
            raise EngineError(f"compiling the tap failed ({first.strip()}): is a C library installed?")
        built.replace(target)
    except OSError as error:
        raise EngineError(f"compiling the tap failed: {error}") from error
    finally:
        built.unlink(missing_ok=True)


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False)


class Native:
    """The loaded tap library with its functions typed."""

    def __init__(self, path: Path) -> None:
        library = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
        tap, tensor, number = ctypes.c_void_p, ctypes.POINTER(TensorInfo), ctypes.c_int64
        floats, int32 = ctypes.POINTER(ctypes.c_float), ctypes.c_int32
        signatures = {
            "psikv_demand_paged_bytes": (ctypes.c_uint64, ()),
            "psikv_tap_new": (tap, ()),
            "psikv_tap_reserve": (ctypes.c_int32, (tap, number)),
            "psikv_tap_free": (None, (tap,)),
            "psikv_tap_n_tensors": (ctypes.c_int32, (tap,)),
            "psikv_tap_tensor": (tensor, (tap, ctypes.c_int32)),
            "psikv_tap_lead": (None, (tap, ctypes.c_int32)),
            "psikv_tap_log": (ctypes.POINTER(number), (tap,)),
            "psikv_release": (number, (tensor, ctypes.POINTER(number), number)),
            "psikv_small_pages": (None, (tensor,)),
            "psikv_score_keys": (int32, (tensor, int32, ctypes.POINTER(number), number, floats, floats)),
            "psikv_sampler_new": (tap, (number, int32, int32, ctypes.c_float)),
            "psikv_sampler_near": (None, (tap, int32)),
            "psikv_sampler_sum": (floats, (tap,)),
            "psikv_sampler_weight": (floats, (tap,)),
            "psikv_sampler_used": (ctypes.POINTER(ctypes.c_uint32), (tap,)),
            "psikv_sampler_queries": (ctypes.c_uint32, (tap,)),
            "psikv_sampler_problem": (int32, (tap,)),
            "psikv_sampler_forget": (None, (tap,)),
            "psikv_tap_sample": (None, (tap, tap)),
            "psikv_tap_sample_layer": (None, (tap, int32, int32)),
        }
        for name, (result, arguments) in signatures.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
        self.library = library
        self.eval_callback = ctypes.cast(library.psikv_tap_eval, ctypes.c_void_p).value
        self.abort_callback = ctypes.cast(library.psikv_tap_abort, ctypes.c_void_p).value


@functools.cache
def _load() -> Native | EngineError:
    try:
        return Native(library_path())
    except EngineError as error:
        return error
    except OSError as error:
        return EngineError(f"the compiled tap cannot be loaded: {error}")


def load() -> Native:
    """The tap, loaded once for the process. Raises EngineError when it can't be had here."""
    loaded = _load()
    if isinstance(loaded, EngineError):
        raise EngineError(str(loaded))
    return loaded


@functools.cache
def load_before_llama_cpp() -> str:
    """Load the tap ahead of llama_cpp, so that new caches are demand-paged; gives why not, or ''.

    Loaded after llama_cpp it has no effect on buffers (the symbol is bound already), and a new cache is
    resident until the engine has released its free cells for the first time.
    """
    late = "llama_cpp" in sys.modules
    try:
        load()
    except EngineError as error:
        return str(error)
    return "llama_cpp was imported before psi_kv_governor: import psi_kv_governor first" if late else ""
