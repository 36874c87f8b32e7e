"""`psi-kv tune`: watch this machine, press a cgroup of its own, and write thresholds with their reasons."""

from __future__ import annotations

import math
import os
import textwrap
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import click
import msgspec
from rich.console import Console
from rich.status import Status

from psi_kv_governor.cli._group import example
from psi_kv_governor.cli._options import cell_bytes_option
from psi_kv_governor.cli.session import ended_by_sigterm
from psi_kv_governor.config import DEFAULT_FILE, GovernorConfig, load_config
from psi_kv_governor.control import CacheSnapshot, pause_s
from psi_kv_governor.control.trials import Trial
from psi_kv_governor.control.tuning import Tuning, tune
from psi_kv_governor.errors import BadInputError, PsiKvError
from psi_kv_governor.pressure import discover
from psi_kv_governor.pressure.reading import Reading
from psi_kv_governor.pressure.trace import read_trace
from psi_kv_governor.sandbox import tuning_scene
from psi_kv_governor.sandbox.sandbox import Sandbox
from psi_kv_governor.whole_file import whole_file

_LINE = 100
"""Columns of a comment in the file."""


@click.command(
    "tune",
    short_help="Find the thresholds for this machine.",
    epilog=example(
        "psi-kv tune --dry-run",
        "psi-kv tune --calm-s 600 --force",
        "psi-kv tune --trace an-evening.jsonl.gz --out evening.toml",
    ),
)
@click.option(
    "--calm-s",
    type=click.FloatRange(min=0, min_open=True),
    default=60.0,
    show_default=True,
    help="How long to watch the machine as it is. Work as usual meanwhile: it is your noise that counts.",
)
@click.option(
    "--trace",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="A recording of the calm machine (`psi-kv record`) instead of watching it now.",
)
@click.option("--no-scene", is_flag=True, help="Press nothing: only what the calm machine tells.")
@click.option(
    "--cells", type=click.IntRange(min=1), default=4096, show_default=True, help="Cells of your context."
)
@cell_bytes_option
@click.option(
    "--out", type=click.Path(path_type=Path), default=DEFAULT_FILE, show_default=True, help="Where to write."
)
@click.option("--force", is_flag=True, help="Replace that file; the old one is kept as FILE.bak.")
@click.option("--dry-run", is_flag=True, help="Print the file and write nothing.")
@click.option("--json", "as_json", is_flag=True, help="Proposals and figures as JSON.")
def command(  # noqa: PLR0917  (one parameter an option)
    calm_s: float,
    trace: Path | None,
    no_scene: bool,
    cells: int,
    cell_bytes: int,
    out: Path,
    force: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Watch the machine calm, then press a memory cgroup of its own, and write psi-kv.toml.

    Each setting is written with its reason. What stands in the file already and is not about thresholds is
    kept as it is. Nothing outside the cgroup is pressed; without the right to make one, only the calm part
    is done. Takes --calm-s and half a minute.
    """
    if math.isnan(calm_s):
        raise BadInputError("--calm-s nan is no length of time: give seconds")
    if out.exists() and not (force or dry_run):
        raise BadInputError(f"{out} is there already: --force replaces it and keeps it as {out.name}.bak")
    base = load_config(out if out.exists() else Path(os.devnull), {})
    cache = _full_cache(base, cells, cell_bytes)
    with ended_by_sigterm(), Console(stderr=True).status("tuning") as status:
        calm = read_trace(trace) if trace is not None else watch_calm(base, calm_s, status)
        scenes, why = ([], "--no-scene") if no_scene else play_scenes(status)
        status.update("comparing thresholds on what was seen")
        tuning = tune(calm, scenes, base, cache)
    text = as_toml(tuning, base, why)
    if not dry_run:
        write(out, text)
    if as_json:
        click.echo(msgspec.json.format(msgspec.json.encode(tuning), indent=2).decode())
    elif dry_run:
        click.echo(text, nl=False)
    else:
        for proposal in tuning.proposals:
            click.echo(f"{proposal.key} = {proposal.value:g}: {proposal.reason}")
        click.echo(f"psi-kv tune: {len(tuning.proposals)} settings written to {out}", err=True)
    for remark in (*tuning.remarks, *([f"no scene was played: {why}"] if why else [])):
        click.echo(f"psi-kv tune: {remark}", err=True)


def _full_cache(config: GovernorConfig, cells: int, cell_bytes: int) -> CacheSnapshot:
    """A context of which everything may go that is not protected."""
    return CacheSnapshot(
        live_bytes=cells * cell_bytes,
        masked_bytes=0,
        lost_bytes=0,
        trimmable_bytes=max(0, cells - config.sink_cells - config.window_cells) * cell_bytes,
        lossless_bytes=0,
        step_bytes=config.block_cells * cell_bytes,
    )


# -- watching ----------------------------------------------------------------------------------------------


def watch_calm(config: GovernorConfig, seconds: float, status: Status) -> list[Reading]:
    """Readings of this machine as it is, as often as the governor would take them. Raises PsiKvError."""
    source = discover().source
    if source is None:
        raise PsiKvError("this machine tells nothing of its memory pressure: see `psi-kv doctor`")
    readings: list[Reading] = []
    end_s = time.monotonic() + seconds
    with closing(source):
        while (left_s := end_s - time.monotonic()) > 0:
            readings.append(source.read())
            status.update(f"watching {source.name} as it is, {left_s:.0f} s more")
            time.sleep(min(left_s, pause_s(config, readings[-1])))
    return readings


def play_scenes(status: Status) -> tuple[list[list[Reading]], str]:
    """The scenes that can be played here, and why there are none, or none with swap."""
    with_swap, why_no_swap = Sandbox.available("zram")
    able, why = Sandbox.available()
    if not able:
        return [], why
    try:
        return tuning_scene.play(with_swap, status.update), ""
    except PsiKvError as error:
        return [], f"{error}" + (f" ({why_no_swap})" if why_no_swap else "")


# -- the file ----------------------------------------------------------------------------------------------


def as_toml(tuning: Tuning, base: GovernorConfig, why_no_scene: str) -> str:
    """psi-kv.toml: the proposals with their reasons, and what else `base` has that is no default."""
    proposed = {proposal.key for proposal in tuning.proposals}
    return "\n".join([*_head(tuning, why_no_scene), *_proposals(tuning), *_kept(base, proposed), ""])


def _head(tuning: Tuning, why_no_scene: str) -> Iterator[str]:
    yield from _comment(f"Found by `psi-kv tune` on {time.strftime('%Y-%m-%d')} for the machine it ran on.")
    yield from _comment(
        f"On what it saw: {_words(tuning.after)}; with the settings before: {_words(tuning.before)}."
    )
    if why_no_scene:
        yield from _comment(f"No neighbour was played: {why_no_scene}.")
    for remark in tuning.remarks:
        yield from _comment(f"Note: {remark}.")


def _words(trial: Trial) -> str:
    alarms = f"{trial.false_trims} false alarm{'' if trial.false_trims == 1 else 's'}"
    reactions = [f"{seconds:.2f} s" if seconds is not None else "never" for seconds in trial.reactions_s]
    return alarms + (f", a neighbour answered after {' and '.join(reactions)}" if reactions else "")


def _proposals(tuning: Tuning) -> Iterator[str]:
    for proposal in tuning.proposals:
        yield ""
        yield from _comment(f"{proposal.reason}.")
        yield _setting(proposal.key, proposal.value)


def _kept(base: GovernorConfig, proposed: set[str]) -> Iterator[str]:
    defaults: dict[str, Any] = msgspec.to_builtins(GovernorConfig())
    kept = {
        key: value
        for key, value in msgspec.to_builtins(base).items()
        if key not in proposed and value != defaults[key]
    }
    if kept:
        yield ""
        yield from _comment("As it was.")
    for key, value in kept.items():
        yield _setting(key, value)


def _comment(text: str) -> Sequence[str]:
    return textwrap.wrap(text, _LINE, initial_indent="# ", subsequent_indent="# ")


def _setting(key: str, value: Any) -> str:
    """A line of TOML. Numbers, strings and truth values are written there as in JSON."""
    return f"{key} = {msgspec.json.encode(value).decode()}"


def write(path: Path, text: str) -> None:
    """Put `text` at `path`, whole or not at all; what was there is kept beside it. Raises BadInputError."""

    def keep_old() -> None:
        if path.exists():
            path.replace(_backup(path))

    try:
        with whole_file(path, before=keep_old) as file:
            file.write(text.encode())
    except OSError as error:
        raise BadInputError(f"cannot write {path}: {error.strerror}") from error


def _backup(path: Path) -> Path:
    """`<name>.bak`, or the next number after those that are there: an older backup is kept too."""
    backup = path.with_name(f"{path.name}.bak")
    number = 1
    while backup.exists():
        number += 1
        backup = path.with_name(f"{path.name}.bak{number}")
    return backup
