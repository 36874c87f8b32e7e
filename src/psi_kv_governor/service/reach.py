"""What of a program the agent reaches, and why not the rest: read from its file, before it is started."""

from __future__ import annotations

import contextlib
import mmap
import os
import shutil
import stat
import subprocess
from collections.abc import Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any

import msgspec
from elftools.common.exceptions import ELFError  # reads ELF files: the maintained library for it
from elftools.elf.elffile import ELFFile

from psi_kv_governor.checks import Check, State
from psi_kv_governor.config import GovernorConfig
from psi_kv_governor.engines.vllm import serve
from psi_kv_governor.service.program import find_program

_HOOKED = "llama_decode"
"""Whoever exports it is a llama.cpp that the agent can stand before."""
_TRACES = (b"llama_decode", b"cache_k_l%d", b"ggml_backend_sched")
"""What a llama.cpp leaves in a file, also where it hides its symbols."""
_GO = (".note.go.buildid", ".go.buildinfo")
_MOST_SCRIPTS = 4
_LISTING_S = 20.0


class Level(str, Enum):
    """How much of a program is reached."""

    FULL = "full"
    """Its caches, sequences and saved states."""
    PAGED = "paged"
    """Its caches are not resident before they are used, and nothing of them is parked."""
    LATER = "later"
    """What it opens while it runs."""
    CHILDREN = "children"
    """Not the program itself, but what it starts."""
    NONE = "none"
    """Nothing: it runs as without us."""


_MEANINGS = {
    Level.FULL: "caches, slots and saved states are governed",
    Level.PAGED: "its cache grows as it is used, and is not governed",
    Level.LATER: "governed as soon as it opens a llama.cpp",
    Level.CHILDREN: "only what it starts is governed",
    Level.NONE: "runs ungoverned",
}


class Reach(msgspec.Struct, frozen=True, kw_only=True):
    """What is reached of a program."""

    level: Level
    how: str
    """Where its llama.cpp is, or why it is not reached, in a clause."""
    remedy: str = ""
    """What to do; empty where nothing has to be done."""


def check_program(name: str, environ: Mapping[str, str]) -> Check:
    """What `psi-kv exec -- NAME` would reach, as a line of the doctor. Raises CannotStartError."""
    reach = reach_of(find_program(name, environ))
    state: State = (
        "ok" if reach.level in {Level.FULL, Level.LATER} else "fail" if reach.level is Level.NONE else "warn"
    )
    return Check("program", state, f"{_MEANINGS[reach.level]}: {reach.how}", reach.remedy)


def check_command(command: Sequence[str], environ: Mapping[str, str]) -> Check:
    """As `check_program`, of a program with its arguments: those of vLLM's server decide what it can give."""
    if not serve.is_serve(command):
        return check_program(command[0], environ)
    path = find_program(command[0], environ)
    serving = serve.prepare(command, path, GovernorConfig(), environ)
    if serving.why_not:
        return Check("program", "fail", f"{_MEANINGS[Level.NONE]}: {serving.why_not}")
    return Check("program", "ok", serving.told)


def reach_of(path: Path) -> Reach:
    """What is reached of the program at `path`. Runs nothing of it: the loader is asked to list, not to
    start. Raises nothing: what can't be read is taken for a program without llama.cpp."""
    with contextlib.suppress(OSError, ELFError):
        return _of_file(path, _MOST_SCRIPTS)
    return Reach(level=Level.LATER, how="it can't be read, so nothing is known before it runs")


def _of_file(path: Path, scripts: int) -> Reach:
    with path.open("rb") as file:
        head = file.read(4096)
    if head[:2] == b"#!" and scripts:
        interpreter = _interpreter(head)
        return _of_file(interpreter, scripts - 1) if interpreter else _nothing_known()
    if why := _why_loader_ignores(path):
        return Reach(level=Level.NONE, how=why[0], remedy=why[1])
    if head[:4] != b"\x7fELF":
        return _nothing_known()
    if head[4:6] + head[18:20] != _own_kind():
        return Reach(
            level=Level.NONE,
            how="it is built for another architecture",
            remedy="take one that is built for this",
        )
    with path.open("rb") as file:
        return _of_elf(path, ELFFile(file))


def _of_elf(path: Path, elf: Any) -> Reach:
    go = any(elf.get_section_by_name(name) for name in _GO)
    loader = next((s.get_interp_name() for s in elf.iter_segments("PT_INTERP")), "")
    if "ld-musl" in loader:
        return Reach(
            level=Level.NONE,
            how="it is built against musl, and this agent against glibc",
            remedy="take a build against glibc (an image that is not Alpine)",
        )
    if go:
        return Reach(
            level=Level.CHILDREN, how="a Go program: it is not looked into, and what it starts is reached"
        )
    if not loader:
        return _of_static(path)
    found, missing = _libraries(path, loader)
    library = next(filter(_exports, found), None)
    if library is not None:
        return _of_library(library)
    if missing:
        return Reach(
            level=Level.NONE,
            how=f"the loader does not find {missing[0]}, so it will not start",
            remedy="install it, or name its folder in LD_LIBRARY_PATH",
        )
    return _of_program(path)


def _of_program(path: Path) -> Reach:
    """A dynamic program that needs no library with llama.cpp in it."""
    if _traces(path):
        return Reach(
            level=Level.PAGED,
            how="llama.cpp is linked into the program itself, and calls itself by address: only what it asks "
            "of the C library is reached",
            remedy="take a build with shared libraries (-DBUILD_SHARED_LIBS=ON)",
        )
    if path.name.startswith(("python", "pypy")):
        return _of_python(path)
    return Reach(level=Level.LATER, how="no llama.cpp in it; one that it opens or starts later is reached")


def _of_static(path: Path) -> Reach:
    if path.name.startswith("ld-"):
        return Reach(level=Level.LATER, how="the loader itself: what it is told to load is reached")
    built_in = _traces(path)
    return Reach(
        level=Level.CHILDREN,
        how="it is linked statically, so no library can be put before "
        + ("its llama.cpp, and not before the C library either" if built_in else "anything"),
        remedy="take a build with shared libraries (-DBUILD_SHARED_LIBS=ON)" if built_in else "",
    )


def _of_library(library: Path) -> Reach:
    with library.open("rb") as file:
        dynamic: Any = ELFFile(file).get_section_by_name(".dynamic")
        if dynamic is not None and any(_bound_to_itself(tag) for tag in dynamic.iter_tags()):
            return Reach(
                level=Level.PAGED,
                how=f"{library} was linked with -Bsymbolic: it calls itself by address",
                remedy="take a build without that flag",
            )
    return Reach(level=Level.FULL, how=f"its llama.cpp is {library}")


def _bound_to_itself(tag: Any) -> bool:
    return tag.entry.d_tag == "DT_SYMBOLIC" or (tag.entry.d_tag == "DT_FLAGS" and bool(tag.entry.d_val & 2))


def _of_python(path: Path) -> Reach:
    """A Python interpreter: what its packages bring."""
    found = [
        library
        for pattern in ("llama_cpp/lib/libllama.so", "xllamacpp/*.so")
        for library in path.parent.parent.glob(f"lib/python3*/site-packages/{pattern}")
        if _exports(library)
    ]
    what = f": here {', '.join(map(str, found))}" if found else ", whatever package brings it"
    return Reach(level=Level.LATER, how=f"Python: a llama.cpp that it opens is reached{what}")


def _nothing_known() -> Reach:
    return Reach(level=Level.LATER, how="no llama.cpp in it; one that it starts later is reached")


def _why_loader_ignores(path: Path) -> tuple[str, str] | None:
    """Where the program starts with other rights than ours the loader takes no preload (AT_SECURE)."""
    status = path.stat()
    other_user = status.st_mode & stat.S_ISUID and status.st_uid != os.geteuid()
    other_group = status.st_mode & stat.S_ISGID and status.st_gid != os.getegid()
    if other_user or other_group:
        return "it is setuid, and the loader ignores LD_PRELOAD for it", "start it as the user it changes to"
    if os.geteuid() != 0:
        with contextlib.suppress(OSError):
            os.getxattr(path, "security.capability")
            return (
                "it has file capabilities, and the loader ignores LD_PRELOAD for it",
                f"take them off (setcap -r {path}) and give them to the service (AmbientCapabilities=)",
            )
    return None


def _interpreter(head: bytes) -> Path | None:
    words = head[2:].split(b"\n")[0].decode(errors="replace").split()
    if words and Path(words[0]).name == "env":
        words = [word for word in words[1:] if not word.startswith("-") and "=" not in word]
    found = shutil.which(words[0]) if words else None
    return Path(found) if found else None


def _own_kind() -> bytes:
    head = Path("/proc/self/exe").open("rb").read(20)  # noqa: SIM115
    return head[4:6] + head[18:20]


def _libraries(path: Path, loader: str) -> tuple[list[Path], list[str]]:
    """What the loader would load with it, in its order, and what it does not find."""
    environ = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    environ["LD_TRACE_LOADED_OBJECTS"] = "1"  # it lists, and starts nothing
    try:
        listed = subprocess.run(
            [loader, str(path)],
            capture_output=True, text=True, timeout=_LISTING_S, check=False, env=environ,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return [], []
    lines = [line.partition("=>") for line in listed.stdout.splitlines()]
    missing = [name.strip() for name, _, where in lines if "not found" in where]
    found = [(where or name).split("(")[0].strip() for name, _, where in lines]
    return [Path(one) for one in found if one.startswith("/")], missing


def _exports(library: Path) -> bool:
    with contextlib.suppress(OSError, ELFError), library.open("rb") as file:
        elf = ELFFile(file)
        table: Any = elf.get_section_by_name(".gnu.hash") or elf.get_section_by_name(".hash")
        return table is not None and table.get_symbol(_HOOKED) is not None
    return False


def _traces(path: Path) -> bool:
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return any(content.find(trace) >= 0 for trace in _TRACES)
