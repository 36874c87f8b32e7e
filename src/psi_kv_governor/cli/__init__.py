"""The command `psi-kv`. Each command is one file here, and is loaded when it is used."""

from __future__ import annotations

import sys

try:
    import click
except ModuleNotFoundError:  # only where it was installed without what it depends on, for the library alone
    sys.exit("psi-kv: error: this needs click: pip install 'psi-kv-governor[cli]'")

from psi_kv_governor.cli._group import LazyGroup, example

COMMANDS = {
    "exec": "Run llama-server, Ollama or any llama.cpp program under the governor.",
    "run": "Complete a prompt under the governor.",
    "chat": "Talk to a model under the governor.",
    "demo": "Watch the governor at work under real memory pressure.",
    "watch": "See a governed process live: stall, headroom, cells and events.",
    "dashboard": "See a governed process as a page in a browser.",
    "status": "See how the governed processes stand.",
    "limit": "Limit what a governed process holds under pressure.",
    "park": "Park what a governed process does not use now.",
    "unpark": "Read back what a governed process has parked.",
    "simulate": "Try the control law on a synthetic machine.",
    "record": "Record this machine's memory pressure, and what the law would do about it.",
    "replay": "Play a recording through the law again, also with other settings.",
    "tune": "Find the thresholds for this machine.",
    "doctor": "Check what this machine has, and what is missing.",
    "policies": "List the policies: which tokens go first.",
    "model": "Fetch and check the demo model.",
    "bench": "Measure the governor on this machine.",
}
"""Name and line of help, in the order of `--help`. The command itself is `<name>.command`."""


def _show_version(ctx: click.Context, _: click.Parameter, wanted: bool) -> None:
    if not wanted or ctx.resilient_parsing:
        return
    from importlib import metadata

    try:
        version = metadata.version("psi-kv-governor")
    except metadata.PackageNotFoundError:
        version = "(a checkout that is not installed)"
    click.echo(f"psi-kv {version}")
    ctx.exit()


main = LazyGroup(
    "psi_kv_governor.cli",
    COMMANDS,
    name="psi-kv",
    help="Give the KV cache's memory back to the operating system under pressure, and put the context back.",
    epilog=example("psi-kv doctor", "psi-kv model fetch", "psi-kv demo"),
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    params=[
        click.Option(
            ["--version"],
            is_flag=True,
            is_eager=True,
            expose_value=False,
            callback=_show_version,
            help="Show the version and exit.",
        )
    ],
)
