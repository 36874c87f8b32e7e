"""All checks in their order, each where nothing that it meets can end the others."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from psi_kv_governor import preflight
from psi_kv_governor.checks import Check, EngineChecks, Look, State, engine_checks
from psi_kv_governor.config import GovernorConfig
from psi_kv_governor.isolated import EndedError, looked

_FILTER = (
    "where it was ended by SIGSYS a seccomp filter kills for a system call: allow it (in a unit "
    "SystemCallFilter=@system-service mincore), or have the filter refuse (SystemCallErrorNumber=EPERM)"
)

_INSTALL = "what engines need is found by the package's metadata: pip install psi-kv-governor"


def run_checks(
    config: GovernorConfig, model: Path | None = None, root: Path = Path("/"), *, isolated: bool = False
) -> Iterator[Check]:
    """All checks, each as soon as it is known: of the machine in the ladder's order, then of the engines.

    `model` None is the demo model. `isolated`: each in a child process, so that what kills it (a seccomp
    filter, a library that is broken, a disk that answers no more) is told and ends nothing else. Where an
    engine is in use already, they are made here.
    """
    engines: dict[str, EngineChecks] = {}
    broken: list[Check] = []
    for name, point in engine_checks().items():
        try:
            engine: EngineChecks = point.load()
            isolated = isolated and not engine.in_use()
            engines[name] = engine
        except Exception as error:
            broken.append(_broken(name, "fail", error))
    for look in (
        Look("pressure", lambda: [preflight.check_pressure(root)]),
        Look("cgroup", lambda: [preflight.check_cgroup(root)], "warn"),
        Look("other killers", lambda: [preflight.check_lines(root)], "warn"),
        Look("swap", lambda: [preflight.check_swap(root)], "warn"),
        Look("overcommit", lambda: [preflight.check_overcommit(root)], "warn"),
        Look("privileges", lambda: [preflight.check_privileges(root)], "warn"),
        Look("place to park", lambda: [preflight.check_place(config)]),
    ):
        yield from _looked(look, isolated)
    for name, engine in engines.items():
        try:
            looks = engine.looks(config, model)
            look = next(looks)
            while True:
                found = _looked(look, isolated)
                yield from found
                look = looks.send(found)
        except StopIteration:
            pass
        except Exception as error:
            broken.append(_broken(name, "fail", error))
    yield from broken or ([] if engines else [Check("engines", "fail", "none is installed", _INSTALL)])


def _looked(look: Look, isolated: bool) -> list[Check]:
    """What is found; a check that says so where it could not be looked at."""
    try:
        if isolated and hasattr(os, "fork"):
            return looked(lambda: list(look.take()), list[Check])
    except EndedError as error:
        return [Check(look.name, look.without, f"it can't be looked at: {error}", _FILTER)]
    except OSError:
        pass  # no child can be started: here, then
    try:
        return list(look.take())
    except Exception as error:
        return [_broken(look.name, look.without, error)]


def _broken(name: str, state: State, error: Exception) -> Check:
    told = f"it can't be looked at: {type(error).__name__}: {' '.join(str(error).split())}"
    return Check(name, state, told)
