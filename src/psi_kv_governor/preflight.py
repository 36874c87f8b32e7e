"""Looks at one thing after the other that the governor needs, and says what to do where it is missing.

Each check is a function that gives `Check`s and raises nothing; `root` stands in for the folder that holds
/proc and /sys.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from psi_kv_governor.config import GovernorConfig
from psi_kv_governor.engine.base import Capability
from psi_kv_governor.engine.llama import native
from psi_kv_governor.errors import BadInputError, EngineError, PsiKvError, StoreError
from psi_kv_governor.model import check, demo_model_path
from psi_kv_governor.pressure.cgroup import find_cgroups
from psi_kv_governor.pressure.discovery import Candidate, discover
from psi_kv_governor.pressure.headroom import HeadroomReader
from psi_kv_governor.pressure.systemd import WATCH
from psi_kv_governor.pressure.waking import find_waker
from psi_kv_governor.sandbox.sandbox import Sandbox
from psi_kv_governor.store import BlobTag, DiskStore, open_store

State = Literal["ok", "warn", "fail"]

_CAP_SYS_RESOURCE = 24  # <linux/capability.h>
_PROBE_BYTES = 8 << 20  # a second on the slowest SD card, and long enough to be a measurement on a fast disk
_PROBE_CELLS = 512  # the smallest context that the engine's self-test fits in comfortably


@dataclass(frozen=True)
class Check:
    """What was found about one thing."""

    name: str
    state: State
    """`ok`; `warn`: the governor works here, with less; `fail`: it can't do its work."""
    detail: str
    remedy: str = ""
    """What to do; empty when all is well."""
    more: tuple[str, ...] = ()
    """Further lines, where one does not tell it all."""


def run_checks(config: GovernorConfig, model: Path | None = None, root: Path = Path("/")) -> Iterator[Check]:
    """All checks in the order of the ladder, each as soon as it is known; `model` None is the demo model."""
    yield check_pressure(root)
    yield check_cgroup(root)
    yield check_swap(root)
    yield check_privileges(root)
    yield check_compiler()
    llama = check_llama()
    yield llama
    tap = check_tap() if llama.state != "fail" else None
    if tap is not None:
        yield tap
    yield check_store(config)
    found = check_model(model)
    yield found
    if found.state == "ok" and tap is not None:
        yield from check_engine(model or demo_model_path())


def check_pressure(root: Path = Path("/")) -> Check:
    """Where stall and headroom are read, and what wakes the loop: each rung of the ladder, a line each."""
    found, waking = discover(root), find_waker(root)
    for opened in (found.source, waking.waker):
        if opened is not None:
            opened.close()
    ladder = (*_rungs(waking.considered, "wakes"), *_rungs(found.considered, "read"))
    if found.off:
        remedy = "take MemoryPressureWatch=off out of the unit to have it govern by itself"
        return Check("pressure", "warn", found.off, remedy, ladder)
    if found.source is None:
        return Check(
            "pressure",
            "fail",
            "neither stall nor headroom can be read",
            "mount /proc, or pip install psutil",
            ladder,
        )
    chosen = found.considered[found.rank]
    detail = f"{chosen.name}: {chosen.why}"
    detail += f"; {waking.waker.name} wakes the loop" if waking.waker is not None else "; polled only"
    if chosen.stall:
        return Check("pressure", "ok", detail, more=ladder)
    return Check("pressure", "warn", detail, _how_to_get_psi(found.considered[: found.rank]), ladder)


def _rungs(considered: list[Candidate], does: str) -> Iterator[str]:
    """A line for each: the first that is usable is the one in use."""
    used = False
    for candidate in considered:
        sign = "no" if not candidate.usable else "spare" if used else does
        used = used or candidate.usable
        yield f"{sign:<6}{candidate.name}: {candidate.why}"


def _how_to_get_psi(better: list[Candidate]) -> str:
    """The remedies for the rungs that would have told the stall."""
    return "; ".join(dict.fromkeys(candidate.why for candidate in better if candidate.name != WATCH))


def check_cgroup(root: Path = Path("/")) -> Check:
    """Which memory cgroup this process is in, and the limit that bites first."""
    cgroups = find_cgroups(root)
    own = cgroups.memory_v1 or cgroups.unified
    reader = HeadroomReader(cgroups, root)
    room = reader.read()
    reader.close()
    if own is None or room is None:
        why = "no cgroup is to be seen: only the machine's own memory counts"
        return Check("cgroup", "warn", why, "mount cgroup2 at /sys/fs/cgroup, or start it under systemd")
    limit = f"{_mib(room.headroom_bytes)} free of the limit of {_mib(room.limit_bytes)} in {room.source}"
    return Check("cgroup", "ok", f"v{own.version} {own.folder}; {limit}")


def check_swap(root: Path = Path("/")) -> Check:
    """Whether there is swap: without it a process is killed before a stall shows."""
    try:
        lines = (root / "proc/swaps").read_text().splitlines()[1:]
    except OSError:
        lines = []
    devices = [words for words in map(str.split, lines) if len(words) >= 4]
    if not devices:
        return Check(
            "swap",
            "warn",
            "none: memory runs out without a stall before, and only headroom tells",
            "add compressed swap, for instance `apt install zram-tools` or systemd-zram-generator",
        )
    named = (f"{words[0]} ({_mib(int(words[2]) * 1024)})" for words in devices)
    return Check("swap", "ok", ", ".join(named))


def check_privileges(root: Path = Path("/")) -> Check:
    """What this user may do. The governor itself needs nothing; `demo` and `bench` want a cgroup."""
    user = os.geteuid() if hasattr(os, "geteuid") else None  # Windows has no such number
    who = "root" if user == 0 else "this user" if user is None else f"user {user}"
    triggers = "" if _may(_CAP_SYS_RESOURCE, root) else ", no CAP_SYS_RESOURCE (PSI windows are whole 2 s)"
    able, why = Sandbox.available()
    if able:
        return Check("privileges", "ok", f"{who}, may make memory cgroups{triggers}")
    return Check(
        "privileges", "warn", f"{who}: `demo` and `bench` have no cgroup of their own{triggers}", why
    )


def _may(capability: int, root: Path) -> bool:
    try:
        status = (root / "proc/self/status").read_text()
    except OSError:
        return False
    effective = next((line for line in status.splitlines() if line.startswith("CapEff:")), "CapEff: 0")
    return bool(int(effective.split()[1], 16) >> capability & 1)


def check_compiler() -> Check:
    """The C compiler that builds the tap, once for each version of llama.cpp."""
    try:
        return Check("compiler", "ok", native.compiler())
    except EngineError as error:
        return Check("compiler", "warn", "none: the tap can't be compiled for a new llama.cpp", str(error))


def check_llama() -> Check:
    """llama-cpp-python and the headers that it installs."""
    try:
        native.llama_cpp_package()
        return Check("llama.cpp", "ok", f"{native.library_version()}, headers in {native.header_dir()}")
    except EngineError as error:
        return Check("llama.cpp", "fail", "not usable", str(error))


def check_tap() -> Check:
    """The native tap: without it no memory can be returned."""
    try:
        return Check("tap", "ok", str(native.library_path()))
    except EngineError as error:
        return Check("tap", "fail", "can't be had, so that no memory can be returned", str(error))


def check_store(config: GovernorConfig) -> Check:
    """Where spilled ranges go, how much fits, and how fast it is: measured with a blob of 8 MiB."""
    try:
        store = open_store(config)
    except (BadInputError, StoreError) as error:
        return Check("store", "fail", "what is given up can't be kept, and is recomputed", str(error))
    if not isinstance(store, DiskStore):
        return Check("store", "warn", "none: what is given up is recomputed", "set store = 'disk'")
    try:
        room = store.room_bytes()
        store.drop(store.put(_PROBE_TAG, _PROBE_BYTES, [memoryview(bytes(_PROBE_BYTES))]))
        speed = (store.write_bytes_per_s or 0.0) / 1e6
        return Check("store", "ok", f"{store.directory}: {_mib(room)} of room, {speed:,.0f} MB/s")
    except StoreError as error:
        return Check("store", "fail", f"{store.directory} takes nothing", str(error))
    finally:
        store.close()


_PROBE_TAG = BlobTag(model="preflight", library="", layout="", start=0, stop=0)


def check_model(model: Path | None = None) -> Check:
    """The model file; None is the demo model, which need not be here."""
    try:
        found = check(model or demo_model_path())
    except PsiKvError as error:
        return Check("model", "warn" if model is None else "fail", "not usable", str(error))
    size = f"{found.size_bytes / 1e6:,.0f} MB"
    return Check("model", "ok", f"{found.path} ({found.architecture}, {found.tensors} tensors, {size})")


def check_engine(model: Path) -> Iterator[Check]:
    """Open the model in a small context: the self-test says which steps it can do on this build."""
    try:
        from psi_kv_governor.engine.llama.llm import GovernedLlama

        llm = GovernedLlama(str(model), n_ctx=_PROBE_CELLS, auto=False, verbose=False)
    except (PsiKvError, ValueError, RuntimeError, OSError) as error:  # the last three are llama_cpp's own
        yield Check("engine", "fail", "the model can't be opened", " ".join(str(error).split()))
        return
    try:
        able = llm.governor.capabilities
        yield _step("release", able.release, "fail")
        yield _step("spill", able.spill, "warn")
        yield _step("recompute", able.recompute, "warn")
    finally:
        llm.close()


def _step(name: str, capability: Capability, without: State) -> Check:
    if capability.able:
        return Check(f"can {name}", "ok", "yes, by the self-test")
    return Check(f"can {name}", without, "no", capability.why)


def _mib(n_bytes: int) -> str:
    return f"{n_bytes / 2**20:,.0f} MiB"
