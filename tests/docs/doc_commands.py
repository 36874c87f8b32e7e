"""The commands that the docs tell people to type."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import click

from psi_kv_governor.cli import COMMANDS, main

ROOT = Path(__file__).parents[2]
PAGES = (*sorted((ROOT / "docs").rglob("*.md")), ROOT / "README.md", ROOT / "CONTRIBUTING.md")
_BLOCK = re.compile(r"^ *```(?:sh|bash|console)\n(.*?)^ *```", re.MULTILINE | re.DOTALL)


class Told(NamedTuple):
    """A command, and where it stands."""

    where: str
    words: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.where}: {' '.join(self.words)}"


def in_text(where: str, text: str) -> Iterator[Told]:
    """Each command of a block: comments are none, redirections are the shell's, and `a && b` are two."""
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(re.sub(r" [<>] \S+", "", line), comments=True)
        while words:
            end = words.index("&&") if "&&" in words else len(words)
            yield Told(where, tuple(words[:end]))
            words = words[end + 1 :]


def told() -> list[Told]:
    """All of them, those in the help of the commands included."""
    found = [
        command
        for page in PAGES
        for block in _BLOCK.findall(page.read_text())
        for command in in_text(str(page.relative_to(ROOT)), block)
    ]
    root = click.Context(main, info_name="psi-kv")
    for name in COMMANDS:
        command = main.get_command(root, name)
        assert command is not None
        lines = (command.epilog or "").replace("\b", "").replace("Examples:", "")
        found.extend(in_text(f"psi-kv {name} --help", lines))
    return found


def parse(words: tuple[str, ...]) -> str:
    """Have the real command line parser take `words`, down to the last command; gives that one's name.

    Raises what it raises where an option is unknown or a value is none. Nothing is run."""
    command: click.Command = main
    name, arguments, parent = words[0], list(words[1:]), None
    while True:
        context = command.make_context(name, arguments, parent=parent)
        if not isinstance(command, click.Group):
            return context.command_path
        left = [*context._protected_args, *context.args]
        found, inner, arguments = command.resolve_command(context, left)
        assert found is not None
        assert inner is not None
        command, name, parent = inner, found, context
