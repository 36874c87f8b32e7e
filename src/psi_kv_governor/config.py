"""The one schema of the configuration, and `load_config`: arguments, environment, file, defaults."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import msgspec

from psi_kv_governor._nearest import nearest
from psi_kv_governor.errors import BadInputError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # type: ignore[import-not-found,unused-ignore]

ENVIRONMENT_PREFIX = "PSI_KV_"
"""PSI_KV_HIGH=0.2 sets `high`."""

OTHER_VARIABLES = frozenset({"PSI_KV_MODELS"})
"""Variables with the prefix that are no settings of the governor: the folder of models (model.py)."""

DEFAULT_FILE = Path("psi-kv.toml")
"""Read from the working directory when no file is named."""


class GovernorConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Thresholds and limits, with defaults for a laptop or an 8 GB board.

    Raises BadInputError on creation when a value is out of its range or contradicts another.
    """

    # -- when ------------------------------------------------------------------------------------------
    high: float = 0.10
    """Stall (`some`, 0 to 1) at which trimming begins. systemd-oomd kills at 0.6 and lmkd wakes at 0.07:
    a tenth of the time lost is felt, and is far above the noise of a healthy machine."""
    high_max: float = 0.30
    """How far the noise of the machine itself, seen while there is plenty of headroom, may raise `high`."""
    acute_full: float = 0.40
    """Stall of all tasks at once (`full`, 0 to 1) that is answered with one large step: with two fifths of
    the time lost by everybody, small steps come too late."""
    low: float = 0.02
    """Stall under which the machine counts as quiet. Between low and high nothing is done either way."""
    headroom_low: float = 0.04
    """Share of the limit under which headroom alone counts as pressure: without swap a neighbour can take
    the rest before any stall shows."""
    headroom_plenty: float = 0.30
    """Share of the limit above which stall alone is no reason to trim: it comes from zram or a burst of
    file reads, and giving memory back would not help."""
    lead_s: float = 0.25
    """How far ahead falling headroom is looked at: a decode is over or interrupted, and the first bytes are
    returned, in less."""
    poll_s: float = 0.2
    """Time between two readings while there is 1 GB of headroom and more: with ten looks a second the
    governor took 0.24 % of one core in half an hour's soak."""
    poll_busy_s: float = 0.02
    """Time between readings when headroom is so small that it could be gone within `poll_s`."""

    # -- how much --------------------------------------------------------------------------------------
    step_min: float = 0.10
    """Share of what may go that one trim takes when pressure just passed the threshold."""
    step_max: float = 0.20
    """Share of what may go that one trim takes at the most, where small steps can wait for their effect."""
    step_acute: float = 0.50
    """Share of what may go that one trim takes at least when memory is about to be gone."""
    cooldown_s: float = 0.3
    """Least time between two small trims: one takes 0.1 s, and its effect shows in the next readings."""
    cooldown_acute_s: float = 0.1
    """Least time before a large one: the stall after a trim shows in a window of 0.1 s."""
    futile_trims: int = 4
    """So many trims in a row without relief, and no more is given: somebody takes whatever is returned."""
    futile_hold_s: float = 30.0
    """After so long one more is tried."""
    floor_cells: int = 256
    """Never fewer live cells than this ..."""
    floor_share: float = 0.20
    """... nor less than this share of the context (arXiv 2605.18053: quality collapses below a fifth)."""
    budget_per_min: float = 2.0
    """Cells that may be given up in any 60 s, as a multiple of the context: bounds what a hostile
    neighbour can force. Two whole contexts leave room for an honest spike after a restore."""

    interrupt_after_s: float = 0.1
    """A decode that still runs so long after a trim was decided on is interrupted, and run again: a batch of
    a long prompt takes seconds. Where memory is about to be gone it is not waited for at all."""
    spill_deadline_s: float = 2.0
    """Longest that writing one trim to the store may take, by the speed it has shown; else cells are evicted
    and recomputed later. A kill by the kernel follows the first stall within seconds."""

    # -- back again ------------------------------------------------------------------------------------
    quiet_s: float = 5.0
    """Quiet time before anything comes back: longer than the pause between two bursts of a build."""
    restore_share: float = 0.5
    """Share of the headroom above the low line that one restore may fill."""

    # -- which -----------------------------------------------------------------------------------------
    policy: str = "hybrid"
    """Which tokens go first: a name of `psi-kv policies`. This one loses least (docs/fidelity.md). Where
    a cache can't serve it, `window` takes its place, and the governor says so."""
    sink_cells: int = 64
    """First tokens, never given up: attention sinks, and the head of a system prompt."""
    window_cells: int = 256
    """Recent tokens, never given up."""
    block_cells: int = 64
    """Unit of eviction. 64 rows of the smallest model here (384 bytes) are six whole pages. Policies whose
    blocks lie apart enlarge it for shorter rows and for long contexts (`policy.chooser.block_size`)."""

    # -- where to --------------------------------------------------------------------------------------
    store: Literal["disk", "none"] = "disk"
    store_dir: str = ""
    """Folder of the disk store; empty for the user's cache directory."""
    store_limit_bytes: int = 8 << 30
    """Most that spilled ranges may take on disk."""
    store_reserve_bytes: int = 512 << 20
    """Free space that is always left on the disk."""

    # -- seen from outside -----------------------------------------------------------------------------
    status_socket: bool = True
    """Let `psi-kv watch` of the same user look on, through a socket that only its owner can open."""

    def __post_init__(self) -> None:
        _check(self)


_SHARES = (
    "high",
    "low",
    "headroom_low",
    "headroom_plenty",
    "high_max",
    "acute_full",
    "step_min",
    "step_max",
    "step_acute",
    "floor_share",
    "restore_share",
)
_POSITIVE_S = {"poll_s": 5.0, "poll_busy_s": 5.0, "spill_deadline_s": sys.float_info.max}
"""With their most: stall over longer intervals tells nothing of now."""
_NOT_NEGATIVE = (
    "cooldown_s",
    "cooldown_acute_s",
    "lead_s",
    "futile_hold_s",
    "interrupt_after_s",
    "quiet_s",
    "budget_per_min",
    "floor_cells",
    "sink_cells",
    "window_cells",
    "store_limit_bytes",
    "store_reserve_bytes",
)
_AT_LEAST_ONE = ("block_cells", "futile_trims")
_ABOVE_ZERO = {
    "high": "every reading would trim",
    "acute_full": "every reading would trim",
    "low": "nothing would ever come back",
}


class _RefusedError(BadInputError):
    """A setting out of its range. `names` are the settings that contradict each other."""

    def __init__(self, message: str, *names: str) -> None:
        super().__init__(message)
        self.names = names


def _check(config: GovernorConfig) -> None:
    def refuse(rule: str, name: str, *others: str) -> None:
        raise _RefusedError(f"{name} = {getattr(config, name)} is not usable: {rule}", name, *others)

    for name in _SHARES:
        if not 0.0 <= getattr(config, name) <= 1.0:  # also refuses NaN
            refuse("give a share from 0 to 1", name)
    for name, most in _POSITIVE_S.items():
        if not 0.0 < getattr(config, name) <= most:
            refuse("give seconds above 0" + (f", up to {most:g}" if most < sys.float_info.max else ""), name)
    for name in _NOT_NEGATIVE:
        if not 0 <= getattr(config, name) < math.inf:
            refuse("give 0 or more", name)
    for name in _AT_LEAST_ONE:
        if getattr(config, name) < 1:
            refuse("give 1 or more", name)
    for name, otherwise in _ABOVE_ZERO.items():
        if getattr(config, name) <= 0.0:
            refuse(f"give a share above 0, or {otherwise}", name)
    for lower, upper in (("low", "high"), ("step_min", "step_max"), ("headroom_low", "headroom_plenty")):
        if getattr(config, lower) > getattr(config, upper):
            refuse(f"it must not be above {upper} ({getattr(config, upper)})", lower, upper)


# -- loading -----------------------------------------------------------------------------------------------


class _Setting(NamedTuple):
    """A value as it was given, and where."""

    value: object
    where: str
    """In words by which the user finds it."""
    typed: bool
    """Whether its origin has types of its own, so that a string is meant as one."""


def load_config(
    path: Path | None = None, environ: Mapping[str, str] | None = None, **overrides: object
) -> GovernorConfig:
    """The configuration by precedence: `overrides`, `environ`, the file, defaults.

    `path` is a TOML file with the fields of GovernorConfig as its keys; without it `psi-kv.toml` in the
    working directory is read if it is there. `environ` is the process's environment unless given; its
    keys are the fields in capitals after PSI_KV_. An override that is None counts as not given. Strings
    in the environment and in overrides are read as the type of their field.

    Raises BadInputError on an unknown key, a wrong type or a value out of its range, saying where it
    came from.
    """
    arguments = {key: value for key, value in overrides.items() if value is not None}
    settings = {
        **_from_file(path),
        **_from_environment(os.environ if environ is None else environ),
        **{key: _Setting(value, f"argument {key}", typed=False) for key, value in arguments.items()},
    }
    values: dict[str, Any] = {name: _convert(name, setting) for name, setting in settings.items()}
    try:
        return GovernorConfig(**values)
    except _RefusedError as error:
        given = [settings[name].where for name in error.names if name in settings]
        raise BadInputError(f"{error} (from {' and '.join(given)})") from None


def _from_file(path: Path | None) -> dict[str, _Setting]:
    if path is None:
        if not DEFAULT_FILE.is_file():
            return {}
        path = DEFAULT_FILE
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadInputError(f"cannot read the configuration {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:  # not TOML, not UTF-8, or nested without end
        raise BadInputError(f"{path} is not TOML: {error}".replace("\n", " ")) from error
    return {key: _Setting(value, f"{key} in {path}", typed=True) for key, value in table.items()}


def _from_environment(environ: Mapping[str, str]) -> dict[str, _Setting]:
    return {
        key.removeprefix(ENVIRONMENT_PREFIX).lower(): _Setting(
            value, f"environment variable {key}", typed=False
        )
        for key, value in environ.items()
        if key.startswith(ENVIRONMENT_PREFIX) and key not in OTHER_VARIABLES
    }


def _convert(name: str, setting: _Setting) -> object:
    fields = {field.name: field.type for field in msgspec.structs.fields(GovernorConfig)}
    if name not in fields:
        near = nearest(name, fields)
        hint = f"did you mean {near}?" if near else f"known are {', '.join(fields)}"
        raise BadInputError(f"unknown setting {name!r} (from {setting.where}): {hint}")
    read_string = isinstance(setting.value, str) and not setting.typed
    try:
        return msgspec.convert(setting.value, fields[name], strict=not read_string)
    except msgspec.ValidationError as error:
        told = f"{name} = {setting.value!r} is not usable: {error}".replace("`", "")
        raise BadInputError(f"{told} (from {setting.where})") from None
