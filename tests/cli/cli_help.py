"""What is asked of every command."""

from __future__ import annotations

from click.testing import Result


def assert_refused(result: Result, words: str) -> None:
    """Status 2, nothing on standard output, and one line that has the words."""
    assert result.exit_code == 2
    assert result.stdout == ""
    said = [line for line in result.stderr.splitlines() if line.startswith(("psi-kv: error: ", "Error: "))]
    assert len(said) == 1
    assert words in said[0]
