"""`psi-kv doctor`: what this machine has, and what to do about what is missing."""

from __future__ import annotations

import os
from pathlib import Path

import click
import msgspec
from rich.console import Console
from rich.text import Text

from psi_kv_governor.checks import Check
from psi_kv_governor.cli._group import example
from psi_kv_governor.config import load_config
from psi_kv_governor.doctor import run_checks
from psi_kv_governor.service.reach import check_command

_SIGNS = {"ok": ("ok  ", "green"), "warn": ("warn", "yellow"), "fail": ("FAIL", "bold red")}


@click.command(
    "doctor",
    short_help="Check what this machine has, and what is missing.",
    epilog=example(
        "psi-kv doctor",
        "psi-kv doctor --model llama-8b.gguf --json",
        "psi-kv doctor -- llama-server",
        "psi-kv doctor -- vllm serve some/model",
    ),
)
@click.option(
    "-m", "--model", type=click.Path(path_type=Path), metavar="PATH", help="A GGUF file. [demo model]"
)
@click.option("--config", "file", type=click.Path(path_type=Path), metavar="FILE", help="A psi-kv.toml.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.argument("program", nargs=-1, type=click.UNPROCESSED)
@click.pass_context
def command(
    ctx: click.Context, model: Path | None, file: Path | None, as_json: bool, program: tuple[str, ...]
) -> None:
    """Check everything that the governor stands on: one line each, with what to do when it is missing.

    With PROGRAM: what `psi-kv exec -- PROGRAM` would reach of it, and why not the rest.

    Exit status 1 when something failed; a warning means that it works, with less.
    """
    console = Console(soft_wrap=True)
    checks = []
    asked = [check_command(program, os.environ)] if program else None
    for check in asked or run_checks(load_config(file, default_file=True), model, isolated=True):
        checks.append(check)
        if not as_json:
            _show(console, check)
    failed = any(check.state == "fail" for check in checks)
    if as_json:
        click.echo(msgspec.json.encode({"ok": not failed, "checks": checks}))
    ctx.exit(1 if failed else 0)


def _show(console: Console, check: Check) -> None:
    sign, style = _SIGNS[check.state]
    line = Text.assemble((sign, style), f"  {check.name:<16}", check.detail)
    if check.remedy:
        line.append(f"; {check.remedy}", style="dim" if check.state == "ok" else style)
    console.print(line)
    for further in check.more:
        console.print(Text(f"{'':24}{further}", style="dim"))
