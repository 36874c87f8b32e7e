"""Finds or compiles the native part, which the engines share: the agent, and the summaries of recall."""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import re
import shutil
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

from psi_kv_governor.errors import EngineError
from psi_kv_governor.kernel.filters import killing_calls
from psi_kv_governor.native.compiling import FLAGS, SOURCE_DIR, compile_command
from psi_kv_governor.user_folders import cache_folder

_SHIPPED = SOURCE_DIR.with_name("libpsikv_agent.so")
"""In a wheel of a platform it comes compiled."""


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
    places = folders()
    for folder in places:  # one that is there, for instance built into an image, needs no compiler
        with contextlib.suppress(OSError):
            _check(folder)
            _check(folder / name)
            return folder / name
    problems: list[str] = []
    for folder in places:
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


def folders() -> list[Path]:
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
