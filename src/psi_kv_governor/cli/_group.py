"""Command groups that load a command only when it is asked for, and end every failure with one line."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any

import click

from psi_kv_governor._nearest import nearest
from psi_kv_governor.errors import BadInputError, PsiKvError

INTERRUPTED = 130
"""128 + SIGINT, as shells count."""

_EXTRAS = {
    "click": "cli",
    "rich": "cli",
    "llama_cpp": "llama",
    "prometheus_client": "metrics",
    "starlette": "dashboard",
    "uvicorn": "dashboard",
}
"""Packages that only an extra brings, by the name they are imported under."""


class NearestGroup(click.Group):
    """Names the command that was probably meant."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        known = self.list_commands(ctx)
        if not name.startswith("-") and name not in known:
            near = nearest(name, known)
            hint = f"Did you mean {near}?" if near else f"Known are {', '.join(known)}."
            ctx.fail(f"No such command '{name}'. {hint}")
        return super().resolve_command(ctx, args)


class LazyGroup(NearestGroup):
    """Commands by name and line of help; `package.name:command` is imported when the command is used.

    `--help` so needs none of them: 0.1 s and not a second, and it works whatever is missing.
    """

    def __init__(self, package: str, about: Mapping[str, str], **attributes: Any) -> None:
        super().__init__(**attributes)
        self._package = package
        self._about = about

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self._about)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self._about:
            return None
        command = import_module(f"{self._package}.{cmd_name}").command
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(self._about.items()))

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        **extra: Any,
    ) -> Any:
        """Run the command line. Ends the process, unless `standalone_mode` is off (as in click)."""
        if not standalone_mode:
            return super().main(args, prog_name, complete_var, standalone_mode=False, **extra)
        status = self._status(args, prog_name or "psi-kv", complete_var, extra)
        sys.exit(status)

    def _status(
        self, args: Sequence[str] | None, name: str, complete_var: str | None, extra: dict[str, Any]
    ) -> int:
        """Run it; gives the exit status: 0, what `ctx.exit` was called with, or that of the failure."""
        try:
            result = super().main(args, name, complete_var, standalone_mode=False, **extra)
            sys.stdout.flush()
            return result if type(result) is int else 0
        except click.ClickException as error:
            error.show()
            return error.exit_code
        except (click.Abort, KeyboardInterrupt) as error:
            # click makes an Abort of Ctrl-C and of an input that ended, and tells them apart by the cause.
            by_key = isinstance(error, KeyboardInterrupt) or isinstance(error.__cause__, KeyboardInterrupt)
            click.echo(f"{name}: {'interrupted' if by_key else 'the input ended'}", err=True)
            return INTERRUPTED if by_key else 1
        except BrokenPipeError:
            _mute_stdout()
            return 1
        except Exception as error:
            if sys.flags.dev_mode:
                raise
            click.echo(f"{name}: error: {_line(error)}", err=True)
            return error.exit_status if isinstance(error, PsiKvError) else 1


def _line(error: Exception) -> str:
    """One line that says what to do."""
    if isinstance(error, PsiKvError):
        return str(error)
    if isinstance(error, ModuleNotFoundError) and (extra := _EXTRAS.get((error.name or "").split(".")[0])):
        return f"this needs {error.name}: pip install 'psi-kv-governor[{extra}]'"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    if isinstance(error, MemoryError):
        return "out of memory: use a smaller model or context (--ctx)"
    what = " ".join(str(error).split())
    return f"unexpected {type(error).__name__}: {what} (python -X dev -m psi_kv_governor.cli shows where)"


def _mute_stdout() -> None:
    """Nobody reads on: send what is still buffered nowhere, or the interpreter complains at its end."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def example(*lines: str) -> str:
    """An epilog of commands to copy, kept as they stand."""
    return "\b\nExamples:\n" + "\n".join(f"  {line}" for line in lines)


def settings_given(option: str, given: Sequence[str]) -> dict[str, str]:
    """What a repeatable `option` KEY=VALUE was given. Raises BadInputError where there is no value."""
    values: dict[str, str] = {}
    for setting in given:
        key, separator, value = setting.partition("=")
        if not separator:
            raise BadInputError(f"{option} {setting} says no value: give KEY=VALUE")
        values[key.strip()] = value.strip()
    return values
