"""The one place that knows how a model is opened and governed, for everything that is shown and measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from psi_kv_governor.errors import PsiKvError
from psi_kv_governor.sandbox.messages import Setup


class Cells(NamedTuple):
    """Where the cells of a context are."""

    live: int
    masked: int
    """Away, and to come back bit for bit."""
    lost: int
    """Away, and to be decoded again."""


def llama_class(setup: Setup) -> Any:
    """The class of what `setup` opens, with all of its modules loaded: which comes first matters.

    Raises PsiKvError where plain llama.cpp is not plain in this process.
    """
    if setup.plain:
        import llama_cpp

        check_plain()
        return llama_cpp.Llama
    from psi_kv_governor.llama import GovernedLlama

    return GovernedLlama


def check_plain(maps: Path = Path("/proc/self/maps")) -> None:
    """Raises PsiKvError where a library of the governor is in this process."""
    try:
        lines = maps.read_text().splitlines()
    except OSError:
        return
    files = {Path(line.split(maxsplit=5)[5]) for line in lines if ".so" in line and line.count(" ") >= 5}
    llamas = sorted(str(file) for file in files if file.name.startswith("libllama.so"))
    ours = sorted(file.name for file in files if "psikv" in file.name)
    if len(llamas) > 1 or ours:  # the agent stands in front of the real one, under its name
        loaded = ", ".join([*llamas, *ours])
        raise PsiKvError(f"plain llama.cpp is not plain here: {loaded}; unset LD_PRELOAD, LLAMA_CPP_LIB_PATH")


def open_llm(setup: Setup) -> Any:
    """The model of `setup`. Only what governs it differs between variants. Raises BadInputError."""
    kind = llama_class(setup)
    if setup.plain:
        return kind(setup.model, **setup.arguments())
    from psi_kv_governor.config import load_config

    config, auto = load_config(**setup.governor_settings()), setup.auto and setup.governed
    return kind(setup.model, config=config, auto=auto, **setup.arguments())


def cells_of(llm: Any, *, plain: bool) -> Cells:
    """Where the cells of the context are."""
    if plain:
        return Cells(int(llm.n_tokens), 0, 0)
    status = llm.governor.status()
    return Cells(status.live_cells, status.masked_cells, status.lost_cells)


def put_back(llm: Any) -> int:
    """Have everything back that the governor lets come back; gives the cells that stay away."""
    if llm.governor.has_room():
        llm.governor.restore()
    status = llm.governor.status()
    return int(status.masked_cells + status.lost_cells)


def logits_of(llm: Any) -> npt.NDArray[np.float32]:
    """Of the last token that was decoded, shape (vocabulary,): not a copy."""
    import llama_cpp

    found = llama_cpp.llama_get_logits_ith(llm.ctx, -1)
    logits: npt.NDArray[np.float32] = np.ctypeslib.as_array(found, shape=(llm.n_vocab(),))
    return logits


def greedy(llm: Any) -> int:
    """The likeliest next token.

    Not by `Llama.sample`: what that makes for each token goes only with Python's collector of cycles, some
    20 MiB at a time, which looks like pressure and is as much as the cgroups here have free.
    """
    return int(np.argmax(logits_of(llm)))
