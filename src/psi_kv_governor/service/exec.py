"""`psi-kv exec`: a program that knows nothing of us, with the agent in it and a governor beside it."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import NamedTuple

from psi_kv_governor.config import GovernorConfig
from psi_kv_governor.engines.llama.fleet import Fleet
from psi_kv_governor.engines.llama.library import agent_path
from psi_kv_governor.engines.llama.process import Chosen, choose
from psi_kv_governor.errors import BadInputError, EngineError
from psi_kv_governor.governor import Governor
from psi_kv_governor.service.beside import Beside
from psi_kv_governor.service.program import Found, Program, end_as, find_program
from psi_kv_governor.service.systemd import notify

SOCKET = "PSIKV_SOCKET"
"""Name of the abstract socket at which agents look for their sidecar; children inherit it."""


class Prepared(NamedTuple):
    """What would be started, and how."""

    found: Found
    agent: str
    """Path of the agent; '' where it can't be had."""
    why_not: str
    """Why the program will run ungoverned; '' where it will not."""
    chosen: Chosen
    inside: bool
    """Whether another `psi-kv exec` governs it already."""


def prepare(command: Sequence[str], config: GovernorConfig, environ: Mapping[str, str]) -> Prepared:
    """Look at everything before anything is started. Raises CannotStartError for the program alone, and
    BadInputError for a folder that was named and can't be used."""
    if not command:
        raise BadInputError("say which program to run: psi-kv exec -- PROGRAM [ARGS]")
    found = find_program(command[0], environ)
    chosen = choose(config)
    agent, why = "", found.unreached
    try:
        agent = str(agent_path())
    except EngineError as error:
        why = why or str(error)
    inside = SOCKET in environ
    return Prepared(found, agent, why, chosen, inside)


def environment(
    prepared: Prepared, fleet: Fleet, config: GovernorConfig, environ: Mapping[str, str]
) -> dict[str, str]:
    """The program's environment: its own, and where the agent is and where it parks."""
    others = [
        name for name in environ.get("LD_PRELOAD", "").replace(":", " ").split() if name != prepared.agent
    ]
    return {
        **environ,
        "LD_PRELOAD": ":".join([prepared.agent, *others]),
        SOCKET: fleet.name,
        "PSIKV_PLACE": prepared.chosen.folder,
        "PSIKV_BACKING": prepared.chosen.backing,
        "PSIKV_RESERVE_BYTES": str(config.place_reserve_bytes),
        "PSIKV_LIMIT_BYTES": str(config.place_limit_bytes),
    }


def run(
    command: Sequence[str],
    config: GovernorConfig,
    *,
    environ: Mapping[str, str] | None = None,
    beside: Sequence[Beside] = (),
) -> int:
    """Run `command` to its end under a governor, with `beside` it; gives the exit status to end with.

    Raises CannotStartError where it can't be started. Whatever else goes wrong is said in one line, and the
    program runs as it would without us.
    """
    environ = dict(os.environ) if environ is None else environ
    prepared = prepare(command, config, environ)
    if prepared.inside or prepared.why_not:
        if not prepared.inside:  # else it has its governor
            _say(f"{command[0]} runs ungoverned: {prepared.why_not}")
        return end_as(Program(command, prepared.found.path, environ).wait())
    opened: list[int] = []
    fleet = Fleet(
        place=prepared.chosen.folder,
        backing=prepared.chosen.backing,
        why_backing=prepared.chosen.why,
        opened=opened.append,
    )
    try:
        program = Program(command, prepared.found.path, environment(prepared, fleet, config, environ))
        with Governor(fleet, config=config, name=prepared.found.path.name) as governor, ExitStack() as stack:
            for one in beside:  # now that signals are the program's: no thread of theirs may take one
                try:
                    stack.callback(one.start(governor).close)
                except OSError as error:
                    _say(f"no {one.name} at {one.address}: {error.strerror or error}")
            notify("READY=1")
            status = program.wait()
            notify("STOPPING=1")
    finally:
        fleet.close()
    if not opened:
        _say(f"{command[0]} opened no llama.cpp cache that could be governed: psi-kv doctor -- {command[0]}")
    return end_as(status)


def _say(line: str) -> None:
    print(f"psi-kv: {line}", file=sys.stderr, flush=True)
