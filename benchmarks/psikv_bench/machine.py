"""Where it is measured, and by which command."""

from __future__ import annotations

import contextlib
import os
import platform
import re
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import msgspec


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    """Where it was measured. Holds no name of a person, a host or a folder."""

    architecture: str
    processor: str
    cores: int
    """Cores that this process may run on."""
    memory_bytes: int
    page_bytes: int
    kernel: str


def command_line(arguments: Sequence[str] | None = None) -> str:
    """The command as it can be typed again, without the folders that its files lie in."""
    program, *rest = sys.argv if arguments is None else arguments
    name = Path(program).name
    return " ".join(["psi-kv" if name == "__main__.py" else name, *map(_without_folder, rest)])


def _without_folder(word: str) -> str:
    option, equals, value = word.rpartition("=")
    return option + equals + (Path(value).name if os.sep in value else value)


def cores() -> int:
    """Cores that this process may run on: fewer than the machine's in a container or under taskset."""
    return len(os.sched_getaffinity(0))


def machine(root: Path = Path("/")) -> Machine:
    """This machine. `root` stands in for the folder that holds /proc."""
    release = re.match(r"\d+(\.\d+)*", platform.release())  # 6.18.4-who-built-it -> 6.18.4
    return Machine(
        architecture=platform.machine(),
        processor=_processor(root),
        cores=cores(),
        memory_bytes=os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        page_bytes=os.sysconf("SC_PAGE_SIZE"),
        kernel=f"{platform.system()} {release[0] if release else platform.release()}",
    )


def _processor(root: Path) -> str:
    """x86 has "model name" for each core; ARM boards have one "Model" at the end, or nothing."""
    with contextlib.suppress(OSError):
        for line in (root / "proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() in {"model name", "Model"} and value.strip():
                return value.strip()
    return platform.processor() or "unknown"


def versions() -> dict[str, str]:
    """Versions of what the figures depend on. A package that is not installed is left out."""
    found = {"python": platform.python_version()}
    for package in ("psi-kv-governor", "llama-cpp-python", "numpy"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found
