"""Where the report goes: JSON, Markdown and plots in one folder."""

from __future__ import annotations

from pathlib import Path

import msgspec

from psi_kv_governor.bench.fidelity.markdown import markdown
from psi_kv_governor.bench.fidelity.plan import Options
from psi_kv_governor.bench.fidelity.plots import draw
from psi_kv_governor.bench.fidelity.results import FidelityReport, Setting
from psi_kv_governor.errors import BadInputError, PsiKvError

JSON, TEXT = "fidelity.json", "README.md"


def recorded(folder: Path) -> FidelityReport | None:
    """The report that is kept in `folder`; None where there is none.

    Raises BadInputError for one that can't be read.
    """
    path = folder / JSON
    if not path.exists():
        return None
    try:
        return msgspec.json.decode(path.read_bytes(), type=FidelityReport)
    except (OSError, msgspec.DecodeError) as error:
        raise BadInputError(f"{path} is no report of this benchmark: {error}".splitlines()[0]) from error


def as_recorded(options: Options, report: FidelityReport) -> Options:
    """`options`, with the setting of `report` where they leave it open: a part of it is measured anew."""
    setting = report.setting
    return msgspec.structs.replace(
        options,
        quick=report.header.quick,
        policies=options.policies or tuple(setting.policies),
        shares=options.shares or tuple(setting.shares),
        ctx=options.ctx or tuple(setting.ctx),
        texts=options.texts or tuple(text.name for text in setting.texts),
        weights=options.weights or setting.weights,
    )


def check_same(earlier: Setting, now: Setting) -> None:
    """Raises BadInputError where the two differ, so that what was measured under them is no one report.

    The default policy may: what was measured is judged by it, and is the same.
    """
    for name in Setting.__struct_fields__:
        if name != "default_policy" and getattr(earlier, name) != getattr(now, name):
            raise BadInputError(f"the report in that folder is of other {name}: give another one (--out-dir)")


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
