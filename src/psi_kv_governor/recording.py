"""A governed run, recorded: every turn of the loop as a line of a trace, written while it runs and read back.

The format is that of `pressure.trace`: a header line, then a line for each Turn. Only what the law was given
and what it answered is in it, and nothing that says whose machine it was: no text, no host or user name, no
folder.
"""

from __future__ import annotations

import contextlib
import logging
import os
import platform
import re
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple, get_args

import msgspec

from psi_kv_governor.config import GovernorConfig
from psi_kv_governor.control import Turn
from psi_kv_governor.errors import BadInputError
from psi_kv_governor.pressure.headroom import machine_headroom
from psi_kv_governor.pressure.trace import VERSION, Header, decode_lines, read_lines

_log = logging.getLogger("psi_kv_governor")

_PRIVATE_SETTINGS = frozenset({"place"})
"""Settings that name a folder of the user. The law does not look at them."""

_CGROUP_PATH = re.compile(r"/sys/fs/cgroup/\S*/")
"""Names of units, containers and users are in the path of a cgroup."""


class Recording(NamedTuple):
    """A trace of a governor, read back."""

    config: GovernorConfig
    """What the decisions were made with."""
    machine: dict[str, str | int]
    package: str
    turns: list[Turn]
    note: str
    """What is missing at its end; empty for a whole file."""


class Recorder:
    """Writes every turn it is told to a new file of mode 0600. Use it as an observer of a Governor.

    Each turn is written at once: the last ones before a kill are those that matter. A file that can't be
    written on (disk full) is given up with a warning, and `problem` says why; the governor is not disturbed.
    Raises BadInputError where there is such a file already, or none can be made.
    """

    def __init__(self, path: Path, config: GovernorConfig) -> None:
        self.path = path
        self.turns = 0
        self.problem = ""
        self._names: dict[str, str] = {}
        try:
            # O_EXCL: a trace is evidence, and is not overwritten. 0600: when a context grew is private.
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except FileExistsError:
            raise BadInputError(f"{path} is there already: give another name, or remove it first") from None
        except OSError as error:
            raise BadInputError(f"cannot record to {path}: {error.strerror}") from error
        self._file = os.fdopen(descriptor, "wb", buffering=0)
        self._encoder = msgspec.json.Encoder()
        self._write(header(config))

    def __call__(self, turn: Turn) -> None:
        """Take down one turn."""
        if self._write(self._without_names(turn)):
            self.turns += 1

    def _without_names(self, turn: Turn) -> Turn:
        """`turn` with a number for each cgroup, the same throughout the file: the law only compares them, and
        repeats them in its reasons."""
        reading = turn.reading
        for level in reading.levels:
            if level.name.startswith("/") and level.name not in self._names:
                self._names[level.name] = f"/cgroup-{len(self._names) + 1}"
        reason = turn.decision.reason
        for name in sorted(self._names, key=len, reverse=True):  # the name of a parent begins that of a child
            reason = reason.replace(name, self._names[name])
        return msgspec.structs.replace(
            turn,
            reading=msgspec.structs.replace(
                reading,
                source=_CGROUP_PATH.sub("…/", reading.source),
                levels=tuple(
                    msgspec.structs.replace(level, name=self._names.get(level.name, level.name))
                    for level in reading.levels
                ),
                neighbours=tuple(
                    msgspec.structs.replace(
                        one, levels=tuple(self._names.get(name, name) for name in one.levels)
                    )
                    for one in reading.neighbours
                ),
            ),
            decision=msgspec.structs.replace(turn.decision, reason=reason),
        )

    def _write(self, line: msgspec.Struct) -> bool:
        if self._file.closed:
            return False
        try:
            self._file.write(self._encoder.encode(line) + b"\n")
        except OSError as error:
            self.problem = f"the recording {self.path} ends here: {error.strerror}"
            _log.warning(self.problem)
            self.close()
            return False
        return True

    def close(self) -> None:
        """No more. A file without a single turn is no recording, and is taken away. Safe to call twice."""
        if not self._file.closed and not self.turns:
            self.path.unlink(missing_ok=True)
        self._file.close()


def header(config: GovernorConfig) -> Header:
    """The first line of a recording made on this machine with `config`."""
    settings: dict[str, Any] = msgspec.to_builtins(config)
    return Header(
        psi_kv_trace=VERSION,
        package=package_version(),
        machine=machine_facts(),
        config={name: value for name, value in settings.items() if name not in _PRIVATE_SETTINGS},
    )


def package_version() -> str:
    """Version of this package; `0+checkout` where it is not installed."""
    try:
        return metadata.version("psi-kv-governor")
    except metadata.PackageNotFoundError:
        return "0+checkout"


def machine_facts(root: Path = Path("/")) -> dict[str, str | int]:
    """What sort of machine this is; `root` stands in for the folder that holds /proc.

    Nothing that tells whose it is: no name of it or of a user, no path, no address.
    """
    facts: dict[str, str | int] = {
        "system": platform.system(),
        "kernel": platform.release().partition("-")[0],  # what follows can be the name of who built it
        "arch": platform.machine(),
        "python": platform.python_version(),
        "cpus": os.cpu_count() or 0,
    }
    memory = machine_headroom(root / "proc/meminfo")
    if memory is not None:
        facts["memory_bytes"] = memory.limit_bytes
    swap_bytes = _swap_bytes(root / "proc/swaps")
    if swap_bytes is not None:
        facts["swap_bytes"] = swap_bytes
    return facts


def _swap_bytes(swaps: Path) -> int | None:
    with contextlib.suppress(OSError, ValueError, IndexError):
        return sum(int(line.split()[2]) * 1024 for line in swaps.read_text().splitlines()[1:])
    return None


# -- reading -----------------------------------------------------------------------------------------------


def read_recording(path: Path) -> Recording:
    """The recording in `path`, plain or gzip. Raises BadInputError, with the line, where it is none.

    A last line that was cut off (the recorder was killed) is left out, and `note` says so.
    """
    trace = read_lines(path)
    if trace.header.psi_kv_trace != VERSION:
        raise BadInputError(
            f"{path} is a recording of the first edition, which counted in cells: `psi-kv simulate --trace` "
            "plays its readings; its decisions can't be compared"
        )
    for number, line in trace.lines:
        _check_keys(path, number, line)
    turns = list(decode_lines(path, trace, Turn))
    for (number, _), turn in zip(trace.lines, turns, strict=True):
        negative = [name for name, count in msgspec.structs.asdict(turn.cache).items() if count < 0]
        if negative:
            raise BadInputError(f"line {number} of the trace {path} makes no sense: {negative[0]} is below 0")
    if not turns:
        raise BadInputError(f"{path} holds no turns of a governor: make one with `psi-kv record`")
    return Recording(
        config=_config(path, trace.header),
        machine=trace.header.machine,
        package=trace.header.package,
        turns=turns,
        note=trace.note,
    )


def _config(path: Path, head: Header) -> GovernorConfig:
    try:
        return msgspec.convert(head.config, GovernorConfig)
    except (msgspec.ValidationError, ValueError) as error:
        told = str(error).replace("`", "")
        raise BadInputError(f"line 1 of {path}: its settings are not those of this package: {told}") from None


def _check_keys(path: Path, number: int, line: bytes) -> None:
    """Refuse a line with keys that this package does not know: it would replay something else."""
    try:
        raw = msgspec.json.decode(line)
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise BadInputError(f"line {number} of the trace {path} is broken: {error}") from error
    if isinstance(raw, dict) and "decision" not in raw:
        raise BadInputError(
            f"line {number} of the trace {path} holds a reading and no decision, so there is nothing to "
            "compare: use it with `psi-kv simulate --trace`"
        )
    unknown = unknown_key(raw, Turn)
    if unknown:
        raise BadInputError(
            f"line {number} of the trace {path}: {unknown!r} is not known here; use the package that "
            "recorded it, or a later one"
        )


def unknown_key(raw: object, kind: type[msgspec.Struct]) -> str:
    """The first key of `raw`, at any depth, that `kind` has no field for; empty where there is none."""
    if not isinstance(raw, dict):
        return ""
    fields = {field.encode_name: field.type for field in msgspec.structs.fields(kind)}
    for name, value in raw.items():
        if name not in fields:
            return str(name)
        inner = next((one for one in (fields[name], *get_args(fields[name])) if _is_struct(one)), None)
        for part in value if isinstance(value, list) else [value]:
            if inner is not None and (found := unknown_key(part, inner)):
                return f"{name}.{found}"
    return ""


def _is_struct(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, msgspec.Struct)
