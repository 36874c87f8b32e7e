"""`psi-kv bench`, asked in this process."""

from __future__ import annotations

from click.testing import CliRunner

from psi_kv_governor import cli


def run(*arguments: str):
    return CliRunner().invoke(cli.main, ["bench", *arguments])
