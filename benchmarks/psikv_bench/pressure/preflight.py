"""Whether the pressure scene can be run here: a line on each thing that it needs, and what to do."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from psi_kv_governor.checks import Check, State
from psi_kv_governor.errors import BadInputError, PsiKvError
from psi_kv_governor.model import check, demo_model_path
from psi_kv_governor.pressure.cgroup import find_cgroups
from psi_kv_governor.pressure.headroom import HeadroomReader
from psi_kv_governor.pressure.psi import PsiFile
from psi_kv_governor.residence.storage import memory_backed
from psi_kv_governor.sandbox.load import MIB
from psi_kv_governor.sandbox.sandbox import Sandbox
from psikv_bench.pressure.options import PressureOptions
from psikv_bench.pressure.scene import outside_bytes
from psikv_bench.pressure.setting import Setting, choose_setting, mapped_by_others, why_not_isolated
from psikv_bench.record import RESULT


def checks(options: PressureOptions, folder: Path | None, root: Path = Path("/")) -> Iterator[Check]:
    """All of them. Where the limit is to be found first, the memory for it is checked when it is."""
    found = [
        check_psi(root),
        *check_isolation(options),
        check_model(options.model, root),
        *([] if folder is None else [check_folder(options, folder)]),
    ]
    yield from found
    if not any(one.state == "fail" for one in found) and options.memory_limit_mib is not None:
        yield check_memory(choose_setting(options), root)


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
    why = why_not_isolated(options)
    if why is not None:
        state: State = "fail" if options.isolate == "cgroup" else "warn"
        yield Check("cgroup", state, "none of its own, so nothing is pressed", why or "--isolate cgroup")
        return
    yield Check("cgroup", "ok", "a memory cgroup of its own")
    able, why_no_swap = Sandbox.available(options.swap)
    remedy = "" if able else f"{why_no_swap}; or choose another --swap"
    yield Check("swap", "ok" if able else "fail", options.swap if able else f"no {options.swap}", remedy)


def check_model(given: str, root: Path = Path("/")) -> Check:
    """The file, and who else has it mapped."""
    try:
        model = Path(given) if given else demo_model_path()
        found = check(model)
    except PsiKvError as error:
        return Check("model", "fail", str(error), "give another with --model")
    others = [f"{pid} ({name})" for pid, name in mapped_by_others(model, root)]
    if others:
        said = f"{model.name} is mapped by {', '.join(others)}, and its weights are charged there"
        return Check("model", "warn", said, "end them, or every variant has more memory than the limit says")
    return Check("model", "ok", f"{model.name} ({found.architecture}, {found.size_bytes / 1e6:,.0f} MB)")


def check_folder(options: PressureOptions, folder: Path) -> Check:
    """Where the report goes; a neighbour that reads files makes them there too."""
    nearest = folder.absolute()
    while not nearest.exists():
        nearest = nearest.parent
    if not nearest.is_dir():
        return Check("out-dir", "fail", f"{nearest} is not a folder", "give another --out-dir")
    if options.load == "files" and (memory := memory_backed(folder.absolute())):
        said = f"files to be read must lie on a disk: {memory}"
        return Check("out-dir", "fail", said, "give another --out-dir")
    kept = " (it holds a report already: --resume goes on with it)" if (folder / RESULT).exists() else ""
    return Check("out-dir", "ok", f"{folder}{kept}")


def check_memory(setting: Setting, root: Path = Path("/")) -> Check:
    """Whether a full cgroup leaves the machine enough."""
    found = HeadroomReader(find_cgroups(root), root).read()
    if found is None:
        return Check("memory", "warn", "the machine does not say how much is available")
    available = f"{found.headroom_bytes // MIB:,} MiB are available"
    if setting.limit_bytes is None:
        most = outside_bytes(root) // MIB
        said = f"the neighbour takes {setting.pressure_bytes // MIB} of {most} MiB"
        return Check("memory", "ok", f"{available}; {said}")
    wanted = setting.limit_bytes + setting.swap_bytes
    detail = f"a run takes up to {wanted // MIB:,} MiB, and {available}"
    if found.headroom_bytes < wanted:
        return Check("memory", "fail", detail, "close other programs, or give a smaller --memory-limit-mib")
    return Check("memory", "ok", f"{detail}; the limit is {setting.limit_bytes // MIB:,} MiB")
