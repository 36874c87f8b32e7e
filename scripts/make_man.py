"""Writes the man pages from the command line's own help, and from the schema of the configuration.

    python scripts/make_man.py [FOLDER]      (default build/man)

psi-kv(1), psi-kv-exec(1) and psi-kv.toml(5). The other commands are used by hand: --help is their page.
"""

from __future__ import annotations

import ast
import inspect
import os
import sys
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import click

from psi_kv_governor import config
from psi_kv_governor.cli import COMMANDS, main
from psi_kv_governor.cli.exec import command as exec_command

MANUAL = "PSI KV Governor"


def roff(text: str) -> str:
    """`text` as a line of roff: nothing in it is a request, and a dash can be copied."""
    text = " ".join(text.split()).replace("\\", r"\e").replace("-", r"\-").replace("`", "")
    return rf"\&{text}" if text.startswith((".", "'")) else text


def heading(name: str, section: int, about: str) -> list[str]:
    version = metadata.version("psi-kv-governor")
    at = time.gmtime(int(os.environ.get("SOURCE_DATE_EPOCH", time.time())))
    title = f'.TH "{name.upper()}" {section} {time.strftime("%Y-%m-%d", at)} "psi-kv {version}" "{MANUAL}"'
    return [title, ".SH NAME", rf"{roff(name)} \- {roff(about.rstrip('.'))}"]


def paragraphs(text: str) -> Iterator[str]:
    for number, paragraph in enumerate(inspect.cleandoc(text).split("\n\n")):
        if number:
            yield ".PP"
        yield roff(paragraph)


def options(command: click.Command, context: click.Context) -> Iterator[str]:
    for parameter in command.get_params(context):
        record = parameter.get_help_record(context)
        if record is not None:
            yield from (".TP", rf"\fB{roff(record[0])}\fR", roff(record[1]))


def examples(epilog: str) -> Iterator[str]:
    lines = [line.strip() for line in epilog.replace("\b", "").splitlines()]
    shown = [line for line in lines if line and line != "Examples:"]
    if shown:
        yield from (".SH EXAMPLES", ".nf")
        yield from map(roff, shown)
        yield ".fi"


def page(name: str, command: click.Command, about: str, more: list[str]) -> str:
    """One page of section 1."""
    context = click.Context(command, info_name=name.replace("psi-kv-", "psi-kv "))
    usage = command.collect_usage_pieces(context)
    lines = [
        *heading(name, 1, about),
        ".SH SYNOPSIS",
        rf"\fB{roff(context.info_name or name)}\fR {roff(' '.join(usage))}",
        ".SH DESCRIPTION",
        *paragraphs(command.help or about),
        ".SH OPTIONS",
        *options(command, context),
        *more,
        *examples(command.epilog or ""),
        ".SH SEE ALSO",
        r"\fBpsi\-kv\fR(1), \fBpsi\-kv\-exec\fR(1), \fBpsi\-kv.toml\fR(5)",
    ]
    return "\n".join(lines) + "\n"


def top() -> str:
    """psi-kv(1)."""
    more = [".SH COMMANDS"]
    for name, about in COMMANDS.items():
        more += [".TP", rf"\fBpsi\-kv {roff(name)}\fR", roff(f"{about} (psi-kv {name} --help)")]
    more += [
        ".SH EXIT STATUS",
        r"0: done. 1: it failed, and one line says why. 2: bad usage or bad input. 130: interrupted.",
        ".SH FILES",
        ".TP",
        r"\fIpsi\-kv.toml\fR",
        r"settings, in the working directory; see \fBpsi\-kv.toml\fR(5)",
    ]
    return page("psi-kv", main, "a language model's KV cache under memory pressure", more)


def settings() -> list[tuple[str, str, str]]:
    """Name, default and meaning of each setting, in the order in which the schema has them."""
    tree = ast.parse(inspect.getsource(config.GovernorConfig))
    (schema,) = tree.body
    assert isinstance(schema, ast.ClassDef)
    found = []
    for field, text in zip(schema.body, schema.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
            assert isinstance(text, ast.Expr), f"{field.target.id} says nothing of itself"
            assert isinstance(text.value, ast.Constant)
            default = getattr(config.GovernorConfig(), field.target.id)
            shown = str(default).lower() if isinstance(default, bool) else repr(default).replace("'", '"')
            found.append((field.target.id, shown, str(text.value.value)))
    return found


def toml() -> str:
    """psi-kv.toml(5)."""
    lines = [
        *heading("psi-kv.toml", 5, "settings of the PSI KV Governor"),
        ".SH DESCRIPTION",
        r"A file in TOML, one setting a line. The commands read the one in the working directory, or the one "
        r"that \fB\-\-config\fR names. A setting is also taken from the environment, as "
        r"\fBPSI_KV_\fR and its name in capitals; that goes before the file, and what a command is given "
        r"goes before both. What is not known, or out of its range, is refused in one line.",
        ".SH SETTINGS",
    ]
    for name, default, meaning in settings():
        lines += [".TP", rf"\fB{roff(name)}\fR = {roff(default)}", roff(meaning)]
    lines += [
        ".SH EXAMPLES", ".nf", 'policy = "window"', "place = \"/var/lib/psi\\-kv\"", ".fi",
        ".SH SEE ALSO", r"\fBpsi\-kv\fR(1), \fBpsi\-kv\-exec\fR(1)",
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def write(folder: Path) -> list[Path]:
    """Write all pages to `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    exec_page = page("psi-kv-exec", exec_command, COMMANDS["exec"], [])
    pages = {"psi-kv.1": top(), "psi-kv-exec.1": exec_page, "psi-kv.toml.5": toml()}
    for file, text in pages.items():
        (folder / file).write_text(text)
    return [folder / file for file in pages]


if __name__ == "__main__":
    for path in write(Path(sys.argv[1] if len(sys.argv) > 1 else "build/man")):
        print(path)
