"""`psi-kv bench`: the command line of all scenes, made from their options."""

from __future__ import annotations

import datetime
import time
import types
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import click
import msgspec
from rich.console import Console
from rich.markdown import Markdown

from psi_kv_governor import model as models
from psi_kv_governor.checks import Check
from psi_kv_governor.cli._group import NearestGroup, example
from psi_kv_governor.cli.session import ended_by_sigterm
from psi_kv_governor.errors import BadInputError, PsiKvError
from psikv_bench.options import Options, chosen, flag, with_model
from psikv_bench.record import Recorder, Report, Say, markdown
from psikv_bench.scene import Scene

SCENES = {
    "trim": "What a trim returns and how fast, and that it changes no bit.",
    "overhead": "What the governor costs while the machine is calm.",
    "scale": "Caches of an 8B model's shape at 32k and 128k cells.",
    "recall": "What recall costs a token, most of the context parked.",
    "fidelity": "What the model still knows when a policy gave up a part.",
    "oom": "At which ramp of a neighbour the kernel begins to kill.",
    "capacity": "The longest context that survives under a memory limit.",
    "latency": "From the first sign of need to the bytes returned.",
    "survival": "Plain and governed in every hostile surrounding: who lives.",
    "server": "A server in a container's limit, ungoverned and governed.",
    "pressure": "One scene under one load, all variants by turns.",
}
"""Name and line of help, in the order of `--help`. The scene is `psikv_bench.scenes.<name>.SCENE`."""

_PLAIN_EVERY_S = 10.0
"""Between two lines of progress where the output is no terminal: a run of hours must not look dead."""
_SHORT = {"model": "-m", "threads": "-t", "ctx": "-c", "ctx_size": "-c", "tokens": "-n", "n_predict": "-n"}


class SceneGroup(NearestGroup):
    """Loads a scene when it is used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(SCENES)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        return command_of(cmd_name) if cmd_name in SCENES else None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Scenes"):
            formatter.write_dl(list(SCENES.items()))


command = SceneGroup(
    "bench",
    short_help="Measure the governor on this machine.",
    help="""Measure what is promised, beside what is asked. Exit status 1 when a figure misses it.

    Timings are compared within one session, by turns; run them on a quiet machine.
    """,
    epilog=example("psi-kv bench trim --quick", "psi-kv bench pressure --preflight-only"),
    no_args_is_help=True,
)


def command_of(name: str) -> click.Command:
    """The command of a scene."""
    scene: Scene = import_module(f"psikv_bench.scenes.{name}").SCENE
    flags = {
        "--quick": "A short form for CI; other options change it.",
        "--json": "The whole report as JSON.",
        "--resume": "Go on with what --out-dir holds.",
    }
    if scene.checks is not None:
        flags["--preflight-only"] = "Only say whether it can be run here."
    about = "Keep JSON, Markdown, CSV and plots there."
    params: list[click.Parameter] = [
        *options_of(scene.options),
        click.Option(["--out-dir"], type=click.Path(path_type=Path), metavar="FOLDER", help=about),
        *(click.Option([name], is_flag=True, help=about) for name, about in flags.items()),
    ]

    def run(**given: Any) -> None:
        _run(name, scene, **given)

    return click.Command(
        name, params=params, callback=run, help=scene.about, epilog=example(*scene.examples) or None
    )


# -- options -----------------------------------------------------------------------------------------------


def options_of(base: Options) -> Iterator[click.Option]:
    """A click option for each field, with the bounds left to the field itself."""
    hints = get_type_hints(type(base), include_extras=True)
    for name in type(base).__struct_fields__:
        kind, about = _bare(hints[name])
        default = getattr(base, name)
        names = [_SHORT[name]] if name in _SHORT else []
        if kind is bool:
            yield click.Option([*names, f"{flag(name)}/--no-{flag(name)[2:]}"], default=None, help=about)
            continue
        if default not in (None, "", ()):
            words = ",".join(map(str, default)) if isinstance(default, tuple) else str(default)
            about = f"{about} [{words}]"
        yield click.Option([*names, flag(name)], type=_click_type(kind), default=None, help=about)


def _bare(hint: Any) -> tuple[Any, str]:
    """The type without None and metadata, and the line of help."""
    about = ""
    if get_origin(hint) in {Union, types.UnionType}:
        (hint,) = (one for one in get_args(hint) if one is not type(None))
    if get_origin(hint) is Annotated:
        hint, *extra = get_args(hint)
        about = next((meta.description or "" for meta in extra if isinstance(meta, msgspec.Meta)), "")
    return hint, about


def _click_type(kind: Any) -> Any:
    if get_origin(kind) is Literal:
        return click.Choice(get_args(kind))
    if get_origin(kind) is tuple:
        return Listed(get_args(kind)[0])
    return {int: click.INT, float: click.FLOAT, str: click.STRING}[kind]


class Listed(click.ParamType):  # type: ignore[type-arg, unused-ignore]
    """Values between commas."""

    name = "list"

    def __init__(self, item: Any) -> None:
        self._item = _click_type(_bare(item)[0])

    def get_metavar(self, param: click.Parameter, ctx: click.Context | None = None) -> str:
        return "A,B,..."

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[Any, ...]:
        words = [word.strip() for word in value.split(",") if word.strip()]
        return tuple(self._item.convert(word, param, ctx) for word in words)


# -- a run -------------------------------------------------------------------------------------------------


def _run(
    name: str,
    scene: Scene,
    *,
    quick: bool,
    json: bool,
    out_dir: Path | None,
    resume: bool,
    preflight_only: bool = False,
    **given: Any,
) -> None:
    options = chosen(scene.quick if quick else scene.options, given)
    folder = out_dir or (_new_folder(name) if scene.keeps else None)
    with ended_by_sigterm():
        if preflight_only and scene.checks is not None:
            _preflight(list(scene.checks(options, folder)), json)
            return
        options = with_model(options)
        models.check(Path(options.model))
        for check in scene.checks(options, folder) if scene.checks is not None else ():
            demand(check)
        with _progress() as say:
            recorder = Recorder(name, options, quick=quick, folder=folder, resume=resume, say=say)
            report = scene.run(recorder)
    _print(report, json)
    if folder is not None:
        click.echo(f"psi-kv bench {name}: kept in {folder}", err=True)
    if report.interrupted:
        raise KeyboardInterrupt
    if report.missed:
        raise PsiKvError("missed: " + "; ".join(one.missed_words for one in report.missed))


def _print(report: Report, as_json: bool) -> None:
    console = Console()
    if as_json:
        click.echo(report.to_json(), nl=False)
    elif console.is_terminal:
        console.print(Markdown(markdown(report)))
    else:
        click.echo(markdown(report), nl=False)


def _new_folder(name: str) -> Path:
    return Path("out") / f"{name}-{datetime.datetime.now().astimezone():%Y%m%d-%H%M%S}"


@contextmanager
def _progress() -> Iterator[Say]:
    """What is being done, on stderr: a line that changes on a terminal, else one now and then."""
    console = Console(stderr=True)
    if console.is_terminal:
        with console.status("starting") as status:
            yield lambda doing, new=False: status.update(doing)
        return
    began_s = said_s = time.monotonic()

    def say(doing: str, *, new: bool = False) -> None:
        nonlocal said_s
        if new or time.monotonic() - said_s >= _PLAIN_EVERY_S:
            said_s = time.monotonic()
            click.echo(f"{said_s - began_s:6.0f} s  {doing}", err=True)

    yield say


# -- whether it can be run ---------------------------------------------------------------------------------


_BAD_INPUT = frozenset({"model", "out-dir"})


def demand(found: Check) -> None:
    """Raise what a failed check means for a run: BadInputError or PsiKvError."""
    if found.state == "fail":
        raise (BadInputError if found.name in _BAD_INPUT else PsiKvError)(f"{found.detail}: {found.remedy}")


def _preflight(found: Sequence[Check], as_json: bool) -> None:
    """A line on each thing. Exit status 1 where the scene can't be run."""
    if as_json:
        click.echo(msgspec.json.format(msgspec.json.encode(found), indent=2))
    for check in () if as_json else found:
        remedy = f" -> {check.remedy}" if check.remedy else ""
        click.echo(f"{check.state:4}  {check.name:8} {check.detail}{remedy}")
    if any(check.state == "fail" for check in found):
        click.get_current_context().exit(1)
