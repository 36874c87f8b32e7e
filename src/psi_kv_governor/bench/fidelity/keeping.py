"""Where the report goes: JSON, Markdown and plots in one folder."""

from __future__ import annotations

import os
from pathlib import Path

from psi_kv_governor.bench.fidelity.markdown import markdown
from psi_kv_governor.bench.fidelity.plots import draw
from psi_kv_governor.bench.fidelity.results import FidelityReport
from psi_kv_governor.errors import BadInputError, PsiKvError

JSON, TEXT = "fidelity.json", "README.md"


def check_folder(folder: Path) -> None:
    """Make `folder`; say before minutes are spent that the report could not be kept. Raises BadInputError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInputError(f"cannot make {folder}: {error.strerror}") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise BadInputError(f"cannot write into {folder}: give a folder that is yours (--out-dir)")


def keep(report: FidelityReport, folder: Path) -> list[Path]:
    """Write JSON, plots and Markdown; gives their paths. Raises PsiKvError where one can't be written."""
    plots = draw(report, folder)
    written = []
    for name, content in ((JSON, report.to_json()), (TEXT, markdown(report, plots).encode())):
        path = folder / name
        try:
            path.write_bytes(content)
        except OSError as error:
            raise PsiKvError(f"cannot write {path}: {error.strerror}") from error
        written.append(path)
    return [*written, *(folder / name for name in plots)]
