"""What mkdocs does for our docs beyond rendering them: see mkdocs.yml.

Pages and pictures that lie outside docs/ because others look for them there (CONTRIBUTING.md, data/) become
part of the site, and the tables of settings and commands are made from the code.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
from mkdocs.structure.files import File

from psi_kv_governor.cli import COMMANDS, main

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "scripts"))  # mkdocs loads this file by its path

import make_man  # noqa: E402

PROJECT = ("CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")
SHOWN = (".md", ".png")
_SOURCE = re.compile(r"\[([^\]]+)\]\((?:\.\./)+((?:benchmarks|examples|packaging|scripts|src|tests)/[^)]+)\)")
"""A link to a source, which the site does not have: its path is shown instead."""


def on_files(files: Any, config: Any) -> Any:
    """Add what lies outside docs/."""
    for name in PROJECT:
        files.append(File.generated(config, f"project/{name}", abs_src_path=str(ROOT / name)))
    for path in sorted((ROOT / "data").rglob("*")):
        if path.suffix in SHOWN:
            where = path.relative_to(ROOT).as_posix()
            files.append(File.generated(config, where, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Point links to where those files are in the site, and fill in what the code says."""
    where = page.file.src_uri
    markdown = _SOURCE.sub(r"\1 (`\2`)", markdown)
    if where.startswith("project/"):
        markdown = re.sub(r"\]\((?:docs/)([^)]+)\)", r"](../\1)", markdown)
    elif not where.startswith("data/"):
        markdown = markdown.replace("](../data/", "](data/")
        for name in PROJECT:
            markdown = markdown.replace(f"](../{name}", f"](project/{name}")
    if where == "settings.md":
        return markdown + "\n".join(settings())
    return markdown + "\n".join(commands()) if where == "commands.md" else markdown


def settings() -> Iterator[str]:
    """A table of all settings."""
    yield from ("", "| setting | default | meaning |", "| --- | --- | --- |")
    for name, default, meaning in make_man.settings():
        yield f"| `{name}` | `{default}` | {cell(meaning)} |"


def commands() -> Iterator[str]:
    """Each command: what it does, its options, its examples."""
    root = click.Context(main, info_name="psi-kv")
    for name, about in COMMANDS.items():
        command = main.get_command(root, name)
        assert command is not None
        context = click.Context(command, info_name=name, parent=root)
        usage = " ".join(command.collect_usage_pieces(context))
        yield from ("", f"## psi-kv {name}", "", about, "", "```text", f"psi-kv {name} {usage}", "```", "")
        yield inspect.cleandoc(command.help or "").replace("\b", "")
        yield from ("", "| option | |", "| --- | --- |")
        for parameter in command.get_params(context):
            if (record := parameter.get_help_record(context)) is not None:
                yield f"| `{record[0]}` | {cell(record[1])} |"
        lines = [line.strip() for line in (command.epilog or "").replace("\b", "").splitlines()]
        yield from ("", "```sh", *(line for line in lines if line and line != "Examples:"), "```")


def cell(text: str) -> str:
    """`text` as it can stand in a table: one line, and nothing in it is markup."""
    return re.sub(r"([|*_<\[\]])", r"\\\1", " ".join(text.split()))
