"""Whether the benchmark can be run here: a line on each thing that it needs, and what to do."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from psi_kv_governor.bench.pen import Pen
from psi_kv_governor.bench.pressure.folder import why_unusable
from psi_kv_governor.bench.pressure.options import PressureOptions
from psi_kv_governor.bench.pressure.setting import Setting, mapped_by_others
from psi_kv_governor.bench.scene import outside_room_bytes
from psi_kv_governor.bench.script import MIB
from psi_kv_governor.errors import BadInputError, PsiKvError
from psi_kv_governor.model import check
from psi_kv_governor.preflight import Check
from psi_kv_governor.pressure.cgroup import find_cgroups
from psi_kv_governor.pressure.headroom import HeadroomReader
from psi_kv_governor.pressure.psi import PsiFile
from psi_kv_governor.store.mounts import memory_backed

_BAD_INPUT = frozenset({"model", "out-dir"})


def checks(options: PressureOptions, out_dir: Path, root: Path = Path("/")) -> Iterator[Check]:
    """Everything but the room in memory, which takes a run of the model to know (`check_memory`)."""
    yield check_psi(root)
    yield from check_isolation(options)
    yield check_model(Path(options.model), root)
    yield check_out_dir(options, out_dir)
    yield check_plots()


def demand(found: Check) -> None:
    """Raise what a failed check means for a run: BadInputError or PsiKvError."""
    if found.state == "fail":
        kind = BadInputError if found.name in _BAD_INPUT else PsiKvError
        raise kind(f"{found.detail}: {found.remedy}")


def check_psi(root: Path = Path("/")) -> Check:
    """The stall of the machine: without it nobody knows what was lost."""
    path = root / "proc/pressure/memory"
    try:
        PsiFile(path).close()
    except (OSError, BadInputError) as error:
        why = error.strerror if isinstance(error, OSError) else str(error)
        return Check("psi", "fail", f"{path} can't be read ({why})", "boot a kernel with PSI, or with psi=1")
    return Check("psi", "ok", str(path))


def check_isolation(options: PressureOptions) -> Iterator[Check]:
    """The memory cgroup and the swap in it."""
    if options.isolate == "host":
        yield Check("cgroup", "warn", "not asked for, so nothing is pressed", "--isolate cgroup")
        return
    able, why = Pen.available()
    if not able:
        optional = options.isolate == "auto"
        told = "no memory cgroup of its own" + (", so nothing is pressed" if optional else "")
        yield Check("cgroup", "warn" if optional else "fail", told, why)
        return
    yield Check("cgroup", "ok", "a memory cgroup of its own")
    able, why = Pen.available(options.swap)
    if able:
        yield Check("swap", "ok", options.swap)
    else:
        yield Check("swap", "fail", f"no swap of the kind {options.swap}", f"{why}; or choose another --swap")


def check_model(model: Path, root: Path = Path("/")) -> Check:
    """The file, and who else has it mapped."""
    try:
        found = check(model)
    except PsiKvError as error:
        return Check("model", "fail", str(error), "give another with --model")
    others = [f"{pid} ({name})" for pid, name in mapped_by_others(model, root)]
    if others:
        told = f"{model.name} is mapped by {', '.join(others)}, and its weights are charged there"
        return Check("model", "warn", told, "end them, or every variant has more room than the limit says")
    return Check("model", "ok", f"{model.name} ({found.architecture}, {found.size_bytes / 1e6:,.0f} MB)")


def check_out_dir(options: PressureOptions, out_dir: Path) -> Check:
    """Where the report goes; a neighbour that reads files makes them there too."""
    why = why_unusable(out_dir)
    if why:
        return Check("out-dir", "fail", why, "give another --out-dir")
    if options.load == "files" and (memory := memory_backed(out_dir.absolute())):
        return Check(
            "out-dir", "fail", f"files to be read must lie on a disk: {memory}", "give another --out-dir"
        )
    return Check("out-dir", "ok", str(out_dir))


def check_plots() -> Check:
    """What draws the plots."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return Check("plots", "warn", "none without matplotlib", "pip install 'psi-kv-governor[plot]'")
    return Check("plots", "ok", "matplotlib")


def check_memory(setting: Setting, root: Path = Path("/")) -> Check:
    """Whether a full pen leaves the machine enough."""
    room = HeadroomReader(find_cgroups(root), root).read()
    if room is None:
        return Check("memory", "warn", "the machine does not tell how much is available")
    available = f"{room.headroom_bytes // MIB:,} MiB are available"
    if setting.limit_bytes is None:
        took = f"the neighbour takes {setting.pressure_bytes // MIB} of {outside_room_bytes(root) // MIB} MiB"
        return Check("memory", "ok", f"{available}; {took}")
    wanted = setting.limit_bytes + (setting.swap_bytes if setting.swap == "zram" else 0)
    detail = f"a run takes up to {wanted // MIB:,} MiB, and {available}"
    if room.headroom_bytes < wanted:
        return Check("memory", "fail", detail, "close other programs, or give a smaller --memory-limit-mib")
    return Check("memory", "ok", f"{detail}; the limit is {setting.limit_bytes // MIB:,} MiB")
