"""All checks of `preflight` in their order, each where nothing that it meets can end the others."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from psi_kv_governor import preflight, preflight_engine
from psi_kv_governor.config import GovernorConfig
from psi_kv_governor.isolated import EndedError, looked
from psi_kv_governor.model import demo_model_path
from psi_kv_governor.preflight import Check, State

_WITHOUT: dict[str, State] = dict.fromkeys(
    (
        "cgroup",
        "other killers",
        "swap",
        "overcommit",
        "privileges",
        "compiler",
        "llama.cpp",
        "model",
        "devices",
    ),
    "warn",
)
"""Of what can't be looked at: what the governor works without."""
_FILTER = (
    "where it was ended by SIGSYS a seccomp filter kills for a system call: allow it (in a unit "
    "SystemCallFilter=@system-service mincore), or have the filter refuse (SystemCallErrorNumber=EPERM)"
)


def run_checks(
    config: GovernorConfig, model: Path | None = None, root: Path = Path("/"), *, isolated: bool = False
) -> Iterator[Check]:
    """All checks in the order of the ladder, each as soon as it is known; `model` None is the demo model.

    `isolated`: each in a child process, so that what kills it (a seccomp filter, a library that is broken, a
    disk that answers no more) is told and ends nothing else. Where llama.cpp is loaded already, they are made
    here: a forked child has its locks, as they were held, without the threads that would give them up.
    """
    isolated = isolated and "llama_cpp" not in sys.modules
    looks: list[tuple[str, Callable[[], Iterable[Check]]]] = [
        ("pressure", lambda: [preflight.check_pressure(root)]),
        ("cgroup", lambda: [preflight.check_cgroup(root)]),
        ("other killers", lambda: [preflight.check_lines(root)]),
        ("swap", lambda: [preflight.check_swap(root)]),
        ("overcommit", lambda: [preflight.check_overcommit(root)]),
        ("privileges", lambda: [preflight.check_privileges(root)]),
        ("compiler", lambda: [preflight.check_compiler()]),
        ("llama.cpp", lambda: [preflight.check_llama()]),
        ("agent", lambda: [preflight.check_agent()]),
        ("place to park", lambda: [preflight.check_place(config)]),
        ("model", lambda: [preflight.check_model(model)]),
    ]
    states: dict[str, State] = {}
    for name, look in looks:
        for found in _looked(name, look, isolated):
            states[found.name] = found.state
            yield found
    if states["model"] == "ok" and "fail" not in {states["llama.cpp"], states["agent"]}:
        yield from _looked("devices", lambda: [preflight_engine.check_devices()], isolated)
        model = model or demo_model_path()
        yield from _looked("engine", lambda: preflight_engine.check_engine(model, config), isolated)


def _looked(name: str, look: Callable[[], Iterable[Check]], isolated: bool) -> list[Check]:
    """What `look` finds; a check that says so where it could not look."""
    try:
        if isolated and hasattr(os, "fork"):
            return looked(lambda: list(look()), list[Check])
    except EndedError as error:
        return [Check(name, _WITHOUT.get(name, "fail"), f"it can't be looked at: {error}", _FILTER)]
    except OSError:
        pass  # no child can be started: here, then
    try:
        return list(look())
    except Exception as error:
        told = f"it can't be looked at: {type(error).__name__}: {' '.join(str(error).split())}"
        return [Check(name, _WITHOUT.get(name, "fail"), told)]
