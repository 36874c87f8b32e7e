"""The one schema of the configuration, and `load_config`: arguments, environment, file, defaults."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import msgspec

from psi_kv_governor._nearest import nearest
from psi_kv_governor.errors import BadInputError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # type: ignore[import-not-found,unused-ignore]

_log = logging.getLogger("psi_kv_governor")

ENVIRONMENT_PREFIX = "PSI_KV_"
"""PSI_KV_HIGH=0.2 sets `high`."""

OTHER_VARIABLES = frozenset({"PSI_KV_MODELS"})
"""Variables with the prefix that are no settings of the governor: the folder of models (model.py)."""

DEFAULT_FILE = Path("psi-kv.toml")
"""What the commands read from the working directory when no file is named; a library never does."""

Share = Annotated[float, msgspec.Meta(ge=0.0, le=1.0)]
AboveZero = Annotated[float, msgspec.Meta(gt=0.0, le=1.0)]
Seconds = Annotated[float, msgspec.Meta(ge=0.0, le=1e9)]
"""A generation at the most: also refuses infinity."""
PollSeconds = Annotated[float, msgspec.Meta(gt=0.0, le=5.0)]
"""Stall over longer intervals tells nothing of now."""
Count = Annotated[int, msgspec.Meta(ge=0)]
OneOrMore = Annotated[int, msgspec.Meta(ge=1)]


class GovernorConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Thresholds and limits, with defaults for anything from an 8 GB board to a server of 128 GB.

    A line given as a share of the limit and as an amount holds where it is lower: shares suit small limits,
    and what a neighbour can take in the time that is needed to act is the same on any machine. Raises
    BadInputError on creation when a value is out of its range or contradicts another.
    """

    # -- when ------------------------------------------------------------------------------------------
    high: AboveZero = 0.10
    """Stall (`some`, 0 to 1) at which trimming begins. systemd-oomd kills at 0.6 and lmkd wakes at 0.07:
    a tenth of the time lost is felt, and is far above the noise of a healthy machine."""
    high_max: Share = 0.30
    """How far the noise of the machine itself, seen while there is plenty of headroom, may raise `high`."""
    acute_full: AboveZero = 0.40
    """Stall of all tasks at once (`full`, 0 to 1) that is answered with one large step: with two fifths of
    the time lost by everybody, small steps come too late."""
    low: AboveZero = 0.02
    """Stall under which the machine counts as quiet; it follows the noise too. Between low and high nothing
    is done either way."""
    headroom_low: Share = 0.04
    """Share of the limit under which headroom alone counts as pressure: without swap a neighbour can take
    the rest before any stall shows ..."""
    headroom_low_bytes: Count = 640 << 20
    """... or this: what the fastest process takes (2.5 GB/s) in `lead_s`. Less than the share from a limit of
    16 GB on; a machine of 128 GB has nothing to fear with 5 GB left."""
    headroom_plenty: Share = 0.30
    """Share of the limit above which stall alone is no reason to trim: it comes from zram or a burst of
    file reads, and giving memory back would not help ..."""
    headroom_plenty_bytes: Count = 4 << 30
    """... or this: the fastest process takes 1.4 s to the low line, fourteen windows of stall."""
    lead_s: Seconds = 0.25
    """How far ahead falling headroom is looked at: the first bytes are returned in less."""
    poll_s: PollSeconds = 0.2
    """Time between two readings while there is 1 GB of headroom and more: with ten looks a second the
    governor took 0.24 % of one core in half an hour's soak."""
    poll_busy_s: PollSeconds = 0.02
    """Time between readings when headroom is so small that it could be gone within `poll_s`."""

    # -- how much --------------------------------------------------------------------------------------
    step_min: Share = 0.10
    """Share of what may go that one trim takes when pressure just passed the threshold."""
    step_max: Share = 0.20
    """Share of what may go that one trim takes at the most, where small steps can wait for their effect."""
    step_acute: Share = 0.50
    """Share of what may go that one trim takes at least when memory is about to be gone."""
    cooldown_s: Seconds = 0.3
    """Least time between two small trims: one takes 0.1 s, and its effect shows in the next readings."""
    cooldown_acute_s: Seconds = 0.1
    """Least time before a large one: the stall after a trim shows in a window of 0.1 s."""
    futile_trims: OneOrMore = 4
    """So many trims in a row without relief, and no more is given: somebody takes whatever is returned, or
    nobody needs it. Never where memory is about to be gone."""
    futile_hold_s: Seconds = 30.0
    """After so long one more is tried."""
    floor_cells: Count = 256
    """Never fewer live cells than this ..."""
    floor_share: Share = 0.20
    """... nor less than this share of the context (arXiv 2605.18053: quality collapses below a fifth)."""
    budget_per_min: Annotated[float, msgspec.Meta(ge=0.0, le=1e9)] = 2.0
    """What may be given up at the cost of fidelity in any 60 s, as a multiple of the context: bounds what a
    hostile neighbour can force. Two whole contexts leave room for an honest spike after a restore."""

    # -- back again ------------------------------------------------------------------------------------
    quiet_s: Seconds = 5.0
    """Quiet time before anything comes back: longer than the pause between two bursts of a build. Twice as
    long after each restore that a trim followed, up to 128 times."""
    restore_share: Share = 0.5
    """Share of the headroom above the low line that one restore may fill ..."""
    restore_reserve_bytes: Count = 1 << 30
    """... or all but this: the fastest process takes 0.4 s for it, twice the time between two readings."""

    # -- which -----------------------------------------------------------------------------------------
    policy: str = "hybrid"
    """Which tokens go first: a name of `psi-kv policies`. This one loses least (docs/fidelity.md). Where
    a cache can't serve it, `window` takes its place, and the governor says so."""
    sink_cells: Count = 64
    """First tokens, never given up: attention sinks, and the head of a system prompt."""
    window_cells: Count = 256
    """Recent tokens, never given up."""
    head_share: Share = 0.5
    """Most of the context that a system prompt may protect: beyond it, a long one would leave nothing to
    give. What is cut is its end; the floor's fifth and as much again for the talk remain."""
    block_cells: OneOrMore = 64
    """Unit in which cells are given up. 64 rows of the smallest model here (384 bytes) are six whole pages.
    Policies whose blocks lie apart enlarge it for shorter rows and long contexts
    (`policy.scoring.block_size`)."""

    recall: Literal["off", "follow", "ahead"] = "ahead"
    """Whether masked cells come back when they are looked for, in the place of others: while decoding goes
    on (`follow`), or besides before a prompt is answered (`ahead`: its end is decoded a second time where
    it asked for what was not there). Of facts that are asked for after three quarters were given up, 3 of
    40 are known without it (docs/fidelity.md)."""
    recall_bytes_per_s: Count = 256 << 20
    """Most that recall reads: an eighth of what the disks here give (2 GB/s)."""

    # -- where to --------------------------------------------------------------------------------------
    place: str = ""
    """Folder in which parked bytes are (unlinked files); empty: one is found. A disk, not memory. `none`:
    what is given up of a context is evicted, and gone until it is decoded again."""
    backing: Literal["auto", "file", "memory"] = "auto"
    """Where a cache lives from the start: in a file of that folder, so that the kernel can take it by itself,
    or in memory. `auto`: in a file where there is no swap, since the kernel would kill there."""
    residence: Literal["auto", "pages", "resize"] = "auto"
    """How a cache of `GovernedLlama` gives memory back: page by page, or by making its context smaller and
    whole again. `auto`: the second where it is in memory of a device, whose pages nobody can return, and by
    hand only where that memory is not the machine's. `resize`: also then."""
    place_limit_bytes: Count = 8 << 30
    """Most that parked bytes may take on disk."""
    place_reserve_bytes: Count = 512 << 20
    """Free space that is always left on the disk."""
    evict: bool = False
    """Drop content and decode it again later, where there is no place to park."""
    write_limit_bytes_per_day: Count = 64 << 30
    """Most that is written to the disk in any 24 hours; 0 is no limit. A consumer SSD of 500 GB is rated for
    300 TB: 13 years of this. What is in the file already is never written twice, and does not count."""

    # -- seen from outside -----------------------------------------------------------------------------
    status_socket: bool = True
    """Let `psi-kv watch` of the same user look on, through a socket that only its owner can open."""

    def __post_init__(self) -> None:
        _check(self)


class _RefusedError(BadInputError):
    """A setting out of its range. `names` are the settings that contradict each other."""

    def __init__(self, message: str, *names: str) -> None:
        super().__init__(message)
        self.names = names


_ORDERED = (
    ("low", "high"),
    ("step_min", "step_max"),
    ("headroom_low", "headroom_plenty"),
    ("headroom_low_bytes", "headroom_plenty_bytes"),
)


def _check(config: GovernorConfig) -> None:
    """Creating a Struct checks neither types nor limits: they are held against the fields' metadata here."""
    for field in msgspec.structs.fields(GovernorConfig):
        value = getattr(config, field.name)
        try:
            # NaN passes every comparison of the metadata; a bool passes for a number.
            if value != value or (isinstance(value, bool) and field.type is not bool):  # noqa: PLR0124
                raise msgspec.ValidationError("give a number")
            msgspec.convert(value, field.type)
        except msgspec.ValidationError as error:
            rule = f"{error}".replace("`", "")
            raise _RefusedError(f"{field.name} = {value} is not usable: {rule}", field.name) from None
    for lower, upper in _ORDERED:
        if getattr(config, lower) > getattr(config, upper):
            rule = f"it must not be above {upper} ({getattr(config, upper)})"
            value = getattr(config, lower)
            raise _RefusedError(f"{lower} = {value} is not usable: {rule}", lower, upper)


# -- loading -----------------------------------------------------------------------------------------------


class _Setting(NamedTuple):
    """A value as it was given, and where."""

    value: object
    where: str
    """In words by which the user finds it."""
    typed: bool
    """Whether its origin has types of its own, so that a string is meant as one."""


def load_config(
    path: Path | None = None,
    environ: Mapping[str, str] | None = None,
    *,
    default_file: bool = False,
    **overrides: object,
) -> GovernorConfig:
    """The configuration by precedence: `overrides`, `environ`, the file, defaults.

    `path` is a TOML file with the fields of GovernorConfig as its keys. With `default_file`, which is for
    commands alone, `psi-kv.toml` in the working directory is read where no `path` is given and it is there:
    a library that did so would take its orders from whoever can write there. `environ` is the process's
    environment unless given; its keys are the fields in capitals after PSI_KV_. One that is no field is
    named once in the log and left out. An override that is None counts as not given. Strings in the
    environment and in overrides are read as the type of their field.

    Returns:
        The configuration, checked as a whole.

    Raises:
        BadInputError: An unknown key of the file or an override, a wrong type, or a value out of its range,
            saying where it came from.
    """
    if path is None and default_file:
        with contextlib.suppress(OSError):  # a working directory that this user may not look into
            path = DEFAULT_FILE if DEFAULT_FILE.is_file() else None
    arguments = {key: value for key, value in overrides.items() if value is not None}
    settings = {
        **({} if path is None else _from_file(path)),
        **_from_environment(os.environ if environ is None else environ),
        **{key: _Setting(value, f"argument {key}", typed=False) for key, value in arguments.items()},
    }
    values: dict[str, Any] = {name: _convert(name, setting) for name, setting in settings.items()}
    try:
        return GovernorConfig(**values)
    except _RefusedError as error:
        given = [settings[name].where for name in error.names if name in settings]
        raise BadInputError(f"{error} (from {' and '.join(given)})") from None


def _from_file(path: Path) -> dict[str, _Setting]:
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadInputError(f"cannot read the configuration {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:  # not TOML, not UTF-8, or nested without end
        raise BadInputError(f"{path} is not TOML: {error}".replace("\n", " ")) from error
    return {key: _Setting(value, f"{key} in {path}", typed=True) for key, value in table.items()}


_named: set[str] = set()
"""Variables that were said to be unknown: each once in a process."""


def _from_environment(environ: Mapping[str, str]) -> dict[str, _Setting]:
    given = {
        key.removeprefix(ENVIRONMENT_PREFIX).lower(): _Setting(value, f"environment variable {key}", False)
        for key, value in environ.items()
        if key.startswith(ENVIRONMENT_PREFIX) and key not in OTHER_VARIABLES
    }
    for name, setting in given.items():
        if name not in _TYPES and setting.where not in _named:
            _named.add(setting.where)
            _log.warning("the %s is no setting and is left out%s", setting.where, _hint(name))
    return {name: setting for name, setting in given.items() if name in _TYPES}


_TYPES = {field.name: field.type for field in msgspec.structs.fields(GovernorConfig)}


def _hint(name: str) -> str:
    near = nearest(name, _TYPES)
    return f": did you mean {near}?" if near else f": known are {', '.join(_TYPES)}"


def _convert(name: str, setting: _Setting) -> object:
    if name not in _TYPES:
        raise BadInputError(f"unknown setting {name!r} (from {setting.where}){_hint(name)}")
    read_string = isinstance(setting.value, str) and not setting.typed
    try:
        return msgspec.convert(setting.value, _TYPES[name], strict=not read_string)
    except msgspec.ValidationError as error:
        told = f"{name} = {setting.value!r} is not usable: {error}".replace("`", "")
        raise BadInputError(f"{told} (from {setting.where})") from None
