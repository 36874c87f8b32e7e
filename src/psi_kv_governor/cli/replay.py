"""`psi-kv replay`: a recording through the law again; the same decisions, or what others would have been."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import click
import msgspec
from rich.table import Table

from psi_kv_governor.amounts import mib
from psi_kv_governor.cli._group import example, settings_given
from psi_kv_governor.cli._tables import table_console
from psi_kv_governor.config import GovernorConfig, load_config
from psi_kv_governor.recording import Recording, package_version, read_recording
from psi_kv_governor.simulation.playback import Account, Difference, account, first_difference, play


@click.command(
    "replay",
    short_help="Play a recording through the law again.",
    epilog=example(
        "psi-kv replay evening.jsonl",
        "psi-kv replay evening.jsonl.gz --what-if high=0.2 --what-if headroom_low=0.1",
        "psi-kv replay evening.jsonl --config psi-kv.toml --json",
    ),
)
@click.argument("file", type=click.Path(path_type=Path))
@click.option(
    "--what-if", "changes", multiple=True, metavar="KEY=VALUE", help="Another setting; again for more."
)
@click.option(
    "--config",
    "config_file",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="What if with the settings of this psi-kv.toml.",
)
@click.option("--json", "as_json", is_flag=True, help="Every figure as JSON.")
@click.pass_context
def command(
    ctx: click.Context, file: Path, changes: tuple[str, ...], config_file: Path | None, as_json: bool
) -> None:
    """Play the readings of FILE, as `psi-kv record` or `run --record` wrote it, through the law.

    Without more, each decision is compared byte for byte with the recorded one: exit status 1, and the
    first that differs, when the law decides otherwise today.

    With --what-if (or --config) the run is played again with other settings. What was recorded shows what
    the recorded decisions did to the cache, so these are played on a simulated cache instead: it begins
    with the context of the first turn, and grows as that did. The readings stay as they are: memory that
    other settings had returned sooner, or not at all, does not show in them, and they come when they came.
    For comparison the settings of the recording are played on that cache too.
    """
    recording = read_recording(file)
    if recording.note:
        click.echo(f"psi-kv: {file}: {recording.note}", err=True)
    accounts = {"recorded": account(recording.turns, recording.config)}
    difference = None
    if changes or config_file is not None:
        accounts |= _imagined(recording, changes, config_file)
    else:
        difference = first_difference(recording.config, recording.turns)
    if as_json:
        _print_json(recording, accounts, difference, compared=len(accounts) == 1)
    else:
        _print_table(file, recording, accounts)
        if len(accounts) == 1:
            click.echo(_verdict(recording, difference))
    ctx.exit(1 if difference else 0)


def _imagined(
    recording: Recording, changes: Sequence[str], config_file: Path | None
) -> Iterator[tuple[str, Account]]:
    """The run played on a simulated cache: as it was set, and as it might have been."""
    what_if = _changed(recording.config, changes, config_file)
    for name, config in (("played again", recording.config), ("what if", what_if)):
        yield name, account(play(config, recording.turns, recording.config), recording.config)


def _changed(config: GovernorConfig, changes: Sequence[str], config_file: Path | None) -> GovernorConfig:
    """`config` with other settings: of the file, and over them the single ones. Raises BadInputError."""
    given: dict[str, object] = dict(settings_given("--what-if", changes))
    base = msgspec.to_builtins(config)
    if config_file is not None:
        base = msgspec.to_builtins(load_config(config_file, {}))
    return load_config(Path(os.devnull), {}, **{**base, **given})  # no file: all is given


# -- what it prints ----------------------------------------------------------------------------------------


def _print_json(
    recording: Recording, accounts: Mapping[str, Account], difference: Difference | None, *, compared: bool
) -> None:
    report = {
        "turns": len(recording.turns),
        "note": recording.note,
        "package": recording.package,
        "machine": recording.machine,
        "same": difference is None if compared else None,
        "difference": None
        if difference is None
        else {
            "turn": difference.turn,
            "recorded": msgspec.Raw(difference.recorded),
            "replayed": msgspec.Raw(difference.replayed),
        },
        "runs": accounts,
    }
    click.echo(msgspec.json.format(msgspec.json.encode(report), indent=2).decode())


def _verdict(recording: Recording, difference: Difference | None) -> str:
    if difference is None:
        return f"All {len(recording.turns):,} decisions are the same, byte for byte."
    by = f"recorded by {recording.package or 'an unknown version'}, this is {package_version()}"
    return (
        f"Turn {difference.turn} (line {difference.turn + 1}) is decided otherwise ({by}):\n"
        f"  recorded {difference.recorded.decode()}\n"
        f"  replayed {difference.replayed.decode()}"
    )


def _print_table(file: Path, recording: Recording, accounts: Mapping[str, Account]) -> None:
    console = table_console()
    seconds = recording.turns[-1].reading.time_s - recording.turns[0].reading.time_s
    table = Table(
        title=f"{file.name}: {len(recording.turns):,} turns in {seconds:,.0f} s",
        title_justify="left",
        title_style="bold",
    )
    table.add_column("", no_wrap=True)
    for name in accounts:
        table.add_column(name, justify="right")
    modes = list(dict.fromkeys(mode for one in accounts.values() for mode in one.mode_s))
    columns = [dict(_rows(one, modes)) for one in accounts.values()]
    for name in columns[0]:
        table.add_row(name, *(column[name] for column in columns))
    console.print(table)


def _rows(one: Account, modes: Sequence[str]) -> Iterator[tuple[str, str]]:
    for mode in modes:
        yield mode, f"{one.mode_s.get(mode, 0.0):,.1f} s"
    yield "trims", f"{one.trims}"
    yield "given up", mib(one.bytes_given_up)
    yield "restores", f"{one.restores} ({mib(one.bytes_restored)})"
    yield "direction changes", f"{one.direction_changes}"
    yield "minimum live share", f"{one.min_live_share:.1%}"
    yield "missing at the end", mib(one.missing_bytes)
    yield "memory first short", "never" if one.onset_s is None else f"at {one.onset_s:.2f} s"
    yield (
        "from there to a trim",
        "-"
        if one.onset_s is None
        else "none"
        if one.onset_to_trim_s is None
        else f"{one.onset_to_trim_s:.2f} s",
    )
    yield "trims before that", f"{one.trims_before_onset}"
