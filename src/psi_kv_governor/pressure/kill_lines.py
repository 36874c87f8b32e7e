"""Other programs that kill, or evict, before the kernel would: each has a line of its own.

Whoever acts at 10 % of the memory available kills the model while the governor still waits for its 4 %. So
each line is a level by itself: headroom is counted down to it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from psi_kv_governor.pressure.reading import Level
from psi_kv_governor.pressure.whole_machine import Memory

_PERCENT = 0.01
_UNITS = {"": 1, "Ki": 1 << 10, "Mi": 1 << 20, "Gi": 1 << 30, "k": 1000, "M": 1000**2, "G": 1000**3}
_KUBELET_LEAST_BYTES = 100 << 20  # memory.available<100Mi, its default on Linux
_RAY_SAYS = re.compile(r"usage threshold at (\d+) bytes .*total system memory bytes: (\d+)")
_RAY_IS_OFF = re.compile(r"MemoryMonitor disabled")
_LOG_BYTES = 1 << 16  # Ray 2.60 says it in the first 2 KiB
_EVICTION = re.compile(r"memory\.available<(\d+(?:\.\d+)?)(Ki|Mi|Gi|k|M|G|%|)(?=[,\s]|$)")


class KillLine(NamedTuple):
    """Where another program acts."""

    who: str
    about: str
    """At what it acts, in words."""
    available_share: float = 0.0
    """It acts below so much of the memory, or ..."""
    available_bytes: int = 0
    """... so many bytes (of two that are given, the lower) ..."""
    swap_share: float | None = None
    """... and below so much of the swap; None where it does not look at swap."""
    needs_swap: bool = False
    """Whether it does nothing on a machine without swap."""
    counts: str = "available"
    """What it takes for free: `available` (MemAvailable), `reusable` (free and inactive file pages), or
    `limit` (what the limit of the nearest cgroup leaves)."""
    of_bytes: int = 0
    """The memory of which it counts, as it says by itself; 0 where it does not. The whole machine's is no
    limit of a cgroup."""

    def level(self, memory: Memory, nearest: Level) -> Level | None:
        """The line as a level; None where it does not act on this machine."""
        if self.needs_swap and not memory.swap_total_bytes:
            return None
        total_bytes, free_bytes = memory.total_bytes, memory.available_bytes
        if self.counts == "reusable":
            free_bytes = memory.reusable_bytes
        elif self._counts_in(nearest, memory):
            total_bytes = nearest.limit_bytes or 0
            free_bytes = (nearest.headroom_bytes or 0) + nearest.mapped_bytes
        lines = (int(self.available_share * total_bytes), self.available_bytes)
        line_bytes = min((n_bytes for n_bytes in lines if n_bytes), default=0)
        room_bytes = max(0, free_bytes - line_bytes)
        if self.swap_share is not None:
            room_bytes += max(0, memory.swap_free_bytes - int(self.swap_share * memory.swap_total_bytes))
        return Level(
            name=self.who, headroom_bytes=room_bytes, limit_bytes=total_bytes, limit=self.about, bites=False
        )

    def _counts_in(self, nearest: Level, memory: Memory) -> bool:
        """Whether it looks at the limit of `nearest`, and not at the whole machine."""
        has_limit = bool(nearest.limit_bytes) and nearest.headroom_bytes is not None
        return self.counts == "limit" and has_limit and self.of_bytes < memory.total_bytes


def find_kill_lines(root: Path, environ: Mapping[str, str]) -> list[KillLine]:
    """The programs that are to be seen here, each once. What can't be read is not there."""
    found: dict[str, KillLine | None] = {}
    for name, folder in _processes(root):
        if name in _KNOWN and name not in found:
            found[name] = _KNOWN[name](_arguments(folder))
        elif name == "raylet" and name not in found:
            found[name] = _ray(_arguments(folder), _environ(folder) or environ)
    if "kubelet" not in found and "KUBERNETES_SERVICE_HOST" in environ:
        found["kubelet"] = _kubelet([])
    return [line for line in found.values() if line is not None]


def _processes(root: Path) -> Iterator[tuple[str, Path]]:
    try:
        folders = [entry for entry in (root / "proc").iterdir() if entry.name.isdigit()]
    except OSError:
        return
    for folder in folders:
        try:
            yield (folder / "comm").read_text(errors="replace").strip(), folder
        except OSError:
            continue


def _arguments(folder: Path) -> list[str]:
    try:
        return (folder / "cmdline").read_bytes().decode(errors="replace").split("\0")[1:-1]
    except OSError:
        return []


def _environ(folder: Path) -> dict[str, str]:
    """With which it was started; nothing where that can't be read."""
    try:
        text = (folder / "environ").read_bytes().decode(errors="replace")
    except OSError:
        return {}
    pairs = (entry.partition("=") for entry in text.split("\0"))
    return {name: value for name, equals, value in pairs if equals}


def _earlyoom(arguments: list[str]) -> KillLine:
    """-m and -s are percent (10 unless given), -M and -S KiB; of two for the same, the lower wins. It acts
    when memory and swap are both below theirs: earlyoom(1)."""
    share = _first_number(arguments, "-m")
    kib = _first_number(arguments, "-M")
    swap_share = _first_number(arguments, "-s")
    memory = 10.0 if share is None and kib is None else share
    told = f"{memory:g} % available" if memory is not None else f"{kib:g} KiB available"
    return KillLine(
        "earlyoom",
        f"earlyoom kills at {told}",
        available_share=0.0 if memory is None else memory * _PERCENT,
        available_bytes=0 if kib is None else int(kib * 1024),
        swap_share=(10.0 if swap_share is None else swap_share) * _PERCENT,
    )


def _first_number(arguments: list[str], option: str) -> float | None:
    """The number of `-m 10`, `-m 10,5` or `-m10`."""
    for at, argument in enumerate(arguments):
        if argument.startswith(option):
            text = argument[len(option) :] or (arguments[at + 1] if at + 1 < len(arguments) else "")
            try:
                return float(text.partition(",")[0])
            except ValueError:
                return None
    return None


def _oomd(_: list[str]) -> KillLine:
    """SwapUsedLimit= is 90 % unless given, of memory and of swap: oomd.conf(5). Its pressure limit (60 % for
    30 s) is far above ours."""
    about = "systemd-oomd kills at 90 % of memory and swap used"
    return KillLine("systemd-oomd", about, available_share=0.1, swap_share=0.1, needs_swap=True)


def _kubelet(arguments: list[str]) -> KillLine:
    """--eviction-hard=memory.available<100Mi unless given; what it calls available leaves active file pages
    out."""
    match = _EVICTION.search(" ".join(arguments))
    number, unit = (float(match[1]), match[2]) if match else (float(_KUBELET_LEAST_BYTES), "")
    told = match[0] if match else "memory.available<100Mi"
    share = number * _PERCENT if unit == "%" else 0.0
    n_bytes = 0 if unit == "%" else int(number * _UNITS[unit])
    return KillLine(
        "kubelet",
        f"kubelet evicts at {told}",
        available_share=share,
        available_bytes=n_bytes,
        counts="reusable",
    )


def _ray(arguments: list[str], environ: Mapping[str, str]) -> KillLine | None:
    """None where its monitor is off. What the raylet says in its log is what counts, since a cluster's
    `--system-config` passes over the environment; without the log it is the environment of the raylet: the
    share (0.95 unless given) or, where it is less that has to be free, the bytes."""
    said = _ray_log(arguments)
    if _RAY_IS_OFF.search(said):
        return None
    if match := _RAY_SAYS.search(said):
        threshold_bytes, of_bytes = int(match[1]), max(1, int(match[2]))
        about = f"Ray kills at {threshold_bytes / of_bytes:.0%} used"
        return KillLine(
            "ray", about, available_bytes=of_bytes - threshold_bytes, counts="limit", of_bytes=of_bytes
        )
    if environ.get("RAY_memory_monitor_refresh_ms") == "0":
        return None
    threshold = min(1.0, max(0.0, _number(environ.get("RAY_memory_usage_threshold"), 0.95)))
    free_bytes = int(_number(environ.get("RAY_min_memory_free_bytes"), -1.0))
    about = f"Ray kills at {threshold:.0%} used"
    return KillLine(
        "ray", about, available_share=1.0 - threshold, available_bytes=max(0, free_bytes), counts="limit"
    )


def _ray_log(arguments: list[str]) -> str:
    """The beginning of what the raylet wrote; '' where that can't be read."""
    option = "--stdout_filepath="
    paths = [word.removeprefix(option) for word in arguments if word.startswith(option)]
    try:
        with Path(paths[0]).open("rb") as file:
            return file.read(_LOG_BYTES).decode(errors="replace")
    except (IndexError, OSError):
        return ""


def _number(text: str | None, otherwise: float) -> float:
    try:
        return float(text or otherwise)
    except ValueError:
        return otherwise


_KNOWN = {"earlyoom": _earlyoom, "systemd-oomd": _oomd, "kubelet": _kubelet}
