"""`psi-kv model`: the demo model, and whether a model file is whole."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click
import msgspec

from psi_kv_governor import model
from psi_kv_governor.cli._group import NearestGroup, example
from psi_kv_governor.errors import BadInputError
from psi_kv_governor.gguf_file import GgufFile
from psi_kv_governor.model_fetch import Progress

_json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


@click.group(
    "model",
    cls=NearestGroup,
    short_help="Fetch and check the demo model.",
    epilog=example("psi-kv model fetch", "psi-kv model check ~/models/llama-8b.gguf"),
)
def command() -> None:
    """Fetch the demo model (98 MB), list the models beside it, check a model file."""


@command.command(
    "fetch", epilog=example("psi-kv model fetch", "PSI_KV_MODELS=/data/models psi-kv model fetch")
)
@_json_option
def fetch(as_json: bool) -> None:
    """Download the demo model. What is there is left alone."""
    with _progress() as on_progress:
        stages: set[str] = set()

        def follow(doing: str, done: int, total: int) -> None:
            stages.add(doing)
            on_progress(doing, done, total)

        path = model.fetch(follow)
    fetched = "unpacking" in stages
    if as_json:
        click.echo(msgspec.json.encode({"path": str(path), "fetched": fetched}))
    elif fetched:
        click.echo(path)
    else:
        click.echo(f"{path} is there already, and right")


@command.command("list", epilog=example("psi-kv model list", "psi-kv model list --json"))
@_json_option
def list_models(as_json: bool) -> None:
    """List the GGUF files in the folder of models, broken ones with what is wrong."""
    found = [_looked_at(path) for path in model.list_models()]
    if as_json:
        click.echo(msgspec.json.encode(found))
        return
    for entry in found:
        about = entry.get("problem") or f"{entry['architecture']}, {entry['tensors']} tensors"
        click.echo(f"{entry['path']}  {int(str(entry['size_bytes'])) / 1e6:,.0f} MB  {about}")
    if not found:
        click.echo(f"no models in {model.models_dir()}: `psi-kv model fetch` gets the demo model", err=True)


@command.command("check", epilog=example("psi-kv model check", "psi-kv model check ~/models/llama-8b.gguf"))
@click.argument("path", required=False, type=click.Path(path_type=Path))
@_json_option
def check(path: Path | None, as_json: bool) -> None:
    """Check that PATH (else the demo model) is a whole GGUF file; the demo model's SHA-256 as well."""
    with _progress() as on_progress:
        found = model.check(path or model.demo_model_path(), on_progress)
    if as_json:
        click.echo(msgspec.json.encode(_entry(found)))
    else:
        click.echo(f"{found.path} is whole: {found.architecture}, {found.tensors} tensors")


@command.command("path", epilog=example("psi-kv run -m $(psi-kv model path) 'Once upon a time'"))
@_json_option
def path(as_json: bool) -> None:
    """Print where the demo model lies."""
    found = str(model.demo_model_path())
    click.echo(msgspec.json.encode({"path": found}) if as_json else found)


def _looked_at(path: Path) -> dict[str, object]:
    try:
        return _entry(model.check(path))
    except BadInputError as error:
        return {"path": str(path), "size_bytes": path.stat().st_size, "problem": str(error)}


def _entry(found: GgufFile) -> dict[str, object]:
    return {
        "path": str(found.path),
        "size_bytes": found.size_bytes,
        "version": found.version,
        "architecture": found.architecture,
        "tensors": found.tensors,
    }


@contextmanager
def _progress() -> Iterator[Progress]:
    """A bar on the terminal, on stderr; nothing where nobody looks."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TransferSpeedColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        tasks: dict[str, TaskID] = {}

        def show(doing: str, done: int, total: int) -> None:
            if doing not in tasks:
                tasks[doing] = bars.add_task(doing)
            bars.update(tasks[doing], completed=done, total=total or None)

        yield show
