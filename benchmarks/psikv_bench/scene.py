"""What a scene is: a benchmark with a name, options and a report. Each is one file in `scenes/`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from psi_kv_governor.checks import Check
from psikv_bench.options import Options
from psikv_bench.record import Recorder, Report


@dataclass(frozen=True)
class Scene:
    """Found by its name: `psikv_bench.scenes.<name>.SCENE`."""

    about: str
    """What `--help` says: the first sentence stands in the list of scenes."""
    options: Options
    """What is measured unless something else is asked for."""
    quick: Options
    """The short form, for CI."""
    run: Callable[[Recorder[Any]], Report]
    """Measures. Raises BadInputError and PsiKvError; Ctrl-C ends one that keeps a journal early."""
    examples: tuple[str, ...] = ()
    checks: Callable[[Any, Path | None], Iterator[Check]] | None = None
    """Whether it can be run here, a line on each thing that it needs; not run without what fails."""
    keeps: bool = False
    """Whether it is kept in a new folder under `out/` where none is given."""
