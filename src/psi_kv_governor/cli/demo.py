"""`psi-kv demo`: the same model under the same pressure, ungoverned and governed."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import click
import msgspec

from psi_kv_governor.cli._demo_view import TITLES, introduction, print_results
from psi_kv_governor.cli._group import example
from psi_kv_governor.cli._scene_view import SceneView
from psi_kv_governor.cli.session import ended_by_sigterm
from psi_kv_governor.model import demo_model_path
from psi_kv_governor.sandbox.load import MIB
from psi_kv_governor.sandbox.sandbox import LEAST_BYTES, Sandbox
from psi_kv_governor.sandbox.scene import SceneResult, run_scene
from psi_kv_governor.sandbox.scene_options import SceneOptions

_POSITIVE = click.IntRange(min=1)


@click.command(
    "demo",
    short_help="Watch the governor at work under real memory pressure.",
    epilog=example(
        "psi-kv demo", "psi-kv demo --tokens 300 --pressure-mib 280", "psi-kv demo --gentle --json"
    ),
)
@click.option(
    "-n", "--tokens", type=_POSITIVE, default=120, show_default=True, help="Decoded under pressure."
)
@click.option(
    "-c", "--ctx", type=_POSITIVE, default=5000, show_default=True, help="Tokens in the context before that."
)
@click.option(
    "--limit-mib",
    type=click.IntRange(min=LEAST_BYTES // MIB),
    default=450,
    show_default=True,
    help="Limit of the cgroup.",
)
@click.option(
    "--pressure-mib", type=_POSITIVE, help="What the neighbour takes [default: 250; 220 without zram]."
)
@click.option("-t", "--threads", type=_POSITIVE, default=1, show_default=True, help="Threads that decode.")
@click.option("-m", "--model", type=click.Path(path_type=Path), help="GGUF file [default: the demo model].")
@click.option("--gentle", is_flag=True, help="Press nothing: trim and restore on order.")
@click.option("--json", "as_json", is_flag=True, help="The figures of both runs as JSON.")
def command(  # noqa: PLR0917  (one parameter an option)
    tokens: int,
    ctx: int,
    limit_mib: int,
    pressure_mib: int | None,
    threads: int,
    model: Path | None,
    gentle: bool,
    as_json: bool,
) -> None:
    """Run a model twice in a memory cgroup of its own, with a process beside it that takes memory.

    First plain llama.cpp, then the same under the governor. Nothing outside that cgroup is pressed, and
    all of it is removed at the end, however the end comes. Takes about two minutes.
    """
    figures: dict[str, Any] = {
        "model": str(model or demo_model_path()),
        "tokens": tokens,
        "context_tokens": ctx,
        "threads": threads,
        "limit_bytes": limit_mib * MIB,
    }
    if pressure_mib is not None:
        figures["pressure_bytes"] = pressure_mib * MIB
    options, remark = choose_scene(figures, gentle)
    if remark:
        click.echo(f"psi-kv demo: {remark}", err=True)
    with ended_by_sigterm(), SceneView(TITLES, introduction(options)) as view:
        results = [run_scene(variant, options, partial(view.show, variant)) for variant in TITLES]
    if as_json:
        click.echo(_json(options, results, remark))
    else:
        print_results(options, results)


def choose_scene(figures: dict[str, Any], gentle: bool) -> tuple[SceneOptions, str]:
    """The strongest scene that this machine can play, and in one line why it is not a stronger one."""
    if gentle:
        return SceneOptions(gentle=True, **figures), ""
    with_swap, why_no_swap = Sandbox.available("zram")
    if with_swap:
        return SceneOptions(**figures), ""
    able, why = Sandbox.available()
    if able:
        return SceneOptions.without_swap(**figures), f"a scene without swap, since {why_no_swap}"
    return SceneOptions(gentle=True, **figures), f"a gentle scene, in which nothing is pressed, since {why}"


def _json(options: SceneOptions, results: list[SceneResult], remark: str) -> str:
    report = {"options": options, "remark": remark, "results": results}
    return msgspec.json.format(msgspec.json.encode(report), indent=2).decode()
