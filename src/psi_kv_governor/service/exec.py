"""`psi-kv exec`: a program that knows nothing of us, with the agent in it and a governor beside it."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from psi_kv_governor.config import GovernorConfig
from psi_kv_governor.engines.llama.fleet import Fleet
from psi_kv_governor.engines.llama.process import Chosen, choose
from psi_kv_governor.engines.vllm import serve
from psi_kv_governor.errors import BadInputError, EngineError
from psi_kv_governor.events import AnsweredMasked, Event
from psi_kv_governor.governor import Governor
from psi_kv_governor.native.building import agent_path, is_agent
from psi_kv_governor.service.beside import Beside
from psi_kv_governor.service.once import park_once
from psi_kv_governor.service.program import HeldSignals, Program, find_program
from psi_kv_governor.service.reach import Level, Reach, reach_of
from psi_kv_governor.service.systemd import notify

SOCKET = "PSIKV_SOCKET"
"""Name of the abstract socket at which agents look for their sidecar; children inherit it."""
PLACE, BACKING = "PSIKV_PLACE", "PSIKV_BACKING"


class Prepared(NamedTuple):
    """What would be started, and how."""

    path: Path
    reach: Reach
    agent: str
    """Path of the agent; '' where it can't be had."""
    why_not: str
    """Why the program will run ungoverned; '' where it will not."""
    chosen: Chosen
    inside: bool
    """Whether another `psi-kv exec` governs it already."""
    serving: serve.Serving | None = None
    """How vLLM's server would be started: it has a plugin, and needs neither agent nor sidecar."""


def prepare(command: Sequence[str], config: GovernorConfig, environ: Mapping[str, str]) -> Prepared:
    """Look at everything before anything is started. Raises CannotStartError for the program alone, and
    BadInputError for a folder that was named and can't be used."""
    if not command:
        raise BadInputError("say which program to run: psi-kv exec -- PROGRAM [ARGS]")
    path = find_program(command[0], environ)
    chosen = choose(config)
    if serve.is_serve(command):
        return _prepare_vllm(command, path, config, environ, chosen)
    reach = reach_of(path)
    agent, why = "", reach.how if reach.level is Level.NONE else ""
    if why and reach.remedy:
        why = f"{why}: {reach.remedy}"
    try:
        agent = str(agent_path())
    except EngineError as error:
        why = why or str(error)
    return Prepared(path, reach, agent, why, chosen, inside=_listens(environ.get(SOCKET, "")))


def _prepare_vllm(
    command: Sequence[str], path: Path, config: GovernorConfig, environ: Mapping[str, str], chosen: Chosen
) -> Prepared:
    serving = serve.prepare(command, path, config, environ)
    level = Level.NONE if serving.why_not else Level.FULL
    reach = Reach(level=level, how=serving.why_not or serving.told)
    return Prepared(path, reach, "", serving.why_not, chosen, inside=False, serving=serving)


def _listens(name: str) -> bool:
    """Whether a sidecar is at that name: the variable outlives one that was killed."""
    if not name:
        return False
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as one:
        try:
            one.connect(f"\0{name}")
        except OSError:
            return False
    return True


def environment(
    prepared: Prepared, fleet: Fleet, config: GovernorConfig, environ: Mapping[str, str]
) -> dict[str, str]:
    """The program's environment: its own, and where the agent is and where it parks."""
    named = environ.get("LD_PRELOAD", "").replace(":", " ").split()
    others = [name for name in named if not is_agent(name)]  # one of another version would be in its way
    return {
        **environ,
        "LD_PRELOAD": ":".join([prepared.agent, *others]),
        SOCKET: fleet.name,
        PLACE: prepared.chosen.folder,
        BACKING: prepared.chosen.backing,
        "PSIKV_RESERVE_BYTES": str(config.place_reserve_bytes),
        "PSIKV_LIMIT_BYTES": str(config.place_limit_bytes),
    }


def run(
    command: Sequence[str],
    config: GovernorConfig,
    held: HeldSignals,
    *,
    environ: Mapping[str, str] | None = None,
    beside: Sequence[Beside] = (),
) -> int:
    """Run `command` to its end under a governor, with `beside` it; gives its wait status.

    Raises CannotStartError where it can't be started. Whatever else goes wrong is said in one line, and the
    program runs as it would without us.
    """
    environ = dict(os.environ) if environ is None else environ
    prepared = prepare(command, config, environ)
    if prepared.serving is not None:
        return _run_vllm(command, prepared.path, prepared.serving, held, beside)
    opened: list[int] = []
    governed, why = None, prepared.why_not
    if not prepared.inside and not why:  # else it has its governor, or can have none
        governed, why = _governed(prepared, config, opened)
    if governed is None:
        program = Program(command, prepared.path, environ, held)
        if why:
            _say(f"{command[0]} runs ungoverned: {why}")
        return program.wait()
    fleet, governor = governed
    try:
        governor.subscribe(_say_answered)
        program = Program(command, prepared.path, environment(prepared, fleet, config, environ), held)
        with contextlib.ExitStack() as ending:
            ending.callback(_harmless, fleet.close)
            ending.callback(_harmless, governor.close)
            _harmless(governor.start)
            _start(beside, governor, ending)
            notify("READY=1")
            status = program.wait()
            notify("STOPPING=1")
    except BaseException:  # nothing was started
        fleet.close()
        raise
    if not opened:
        _say(f"{command[0]} opened no llama.cpp cache that could be governed: psi-kv doctor -- {command[0]}")
    return status


def _governed(
    prepared: Prepared, config: GovernorConfig, opened: list[int]
) -> tuple[tuple[Fleet, Governor] | None, str]:
    """What governs the program that is about to be started, or why it runs without. Raises BadInputError
    where a setting is wrong: nothing was started yet."""
    try:
        fleet = Fleet(
            place=prepared.chosen.folder,
            backing=prepared.chosen.backing,
            why_backing=prepared.chosen.why,
            opened=opened.append,
            refused=lambda pid, why: _say(f"process {pid} runs ungoverned: {why}"),
        )
    except OSError as error:
        return None, f"no socket can be made for its agent: {error.strerror or error}"
    try:
        return (fleet, Governor(fleet, config=config, name=prepared.path.name)), ""
    except BadInputError:
        fleet.close()
        raise
    except Exception as error:
        fleet.close()
        return None, f"the governor can't be made: {error}"


def _run_vllm(
    command: Sequence[str],
    path: Path,
    serving: serve.Serving,
    held: HeldSignals,
    beside: Sequence[Beside],
) -> int:
    """Its governor is in its own engine, which is reached as any other: `psi-kv watch`, `psi-kv status`."""
    program = Program(serving.command, path, serving.environ, held)
    if serving.why_not:
        _say(f"{command[0]} runs ungoverned: {serving.why_not}")
    for one in beside:
        _say(f"no {one.name} here: vLLM's governor is in its engine (psi-kv dashboard, and vLLM's /metrics)")
    return program.wait()


def _start(beside: Sequence[Beside], governor: Governor, ending: contextlib.ExitStack) -> None:
    """What can be had of it: the program runs without the rest."""
    for one in beside:
        try:
            running = one.start(governor)
        except Exception as error:
            _say(f"no {one.name} at {one.address}: {getattr(error, 'strerror', '') or error}")
        else:
            ending.callback(_harmless, running.close)


def _say_answered(event: Event) -> None:
    """A line in the program's own log: what was answered without the whole context is never silent."""
    if isinstance(event, AnsweredMasked):
        _say(
            f"slot {event.sequence} of process {event.pid}: {event.tokens} tokens were decoded with up to "
            f"{event.masked} cells masked"
        )


def _harmless(action: Callable[[], None]) -> None:
    """Nothing of ours may end the program, or change the status that it ends with."""
    try:
        action()
    except Exception as error:
        _say(f"the governor failed, and the program runs on: {error}")


def attach(pid: int, config: GovernorConfig, held: HeldSignals, *, beside: Sequence[Beside] = ()) -> None:
    """Govern a program, and its children, whose sidecar is gone, until it ends or we are told to. One that
    was not started by `psi-kv exec` is parked once.

    Raises BadInputError where that can't be, and PsiKvError where it failed on the way.
    """
    environ = _environ_of(pid)
    name = environ.get(SOCKET, "")
    if not name:
        _say(park_once(pid, config))
        return
    if _listens(name):
        raise BadInputError(f"process {pid} has its governor already: psi-kv watch")
    fleet = Fleet(
        place=environ.get(PLACE, ""),
        backing=environ.get(BACKING, "memory"),
        name=name,
        refused=lambda pid, why: _say(f"process {pid} stays ungoverned: {why}"),
    )
    try:
        with Governor(fleet, config=config, name=_name_of(pid)) as governor, contextlib.ExitStack() as ending:
            governor.subscribe(_say_answered)
            _start(beside, governor, ending)
            notify("READY=1")
            held.wait_for(pid)
            notify("STOPPING=1")
    finally:
        fleet.close()


def _environ_of(pid: int) -> dict[str, str]:
    try:
        raw = Path(f"/proc/{pid}/environ").read_bytes()
    except FileNotFoundError:
        raise BadInputError(f"there is no process {pid}") from None
    except OSError as error:
        raise BadInputError(f"process {pid} is not yours to govern: {error.strerror}") from error
    pairs = (
        one.partition("=")[::2] for one in raw.decode(errors="surrogateescape").split("\0") if "=" in one
    )
    return dict(pairs)


def _name_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text(errors="replace").strip()
    except OSError:
        return str(pid)


def _say(line: str) -> None:
    print(f"psi-kv: {line}", file=sys.stderr, flush=True)
