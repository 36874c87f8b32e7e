"""The one place that knows how a model is opened and governed, for everything that is shown and measured."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from psi_kv_governor.errors import PsiKvError

_NOTHING: Mapping[str, Any] = {}


def open_llm(
    model: str,
    *,
    plain: bool,
    auto: bool = True,
    settings: Mapping[str, Any] = _NOTHING,
    **options: Any,
) -> Any:
    """Plain llama.cpp, or with a governor that has these `settings` and acts by itself where it is `auto`.

    Nothing else differs between the two; `options` are those of llama_cpp.Llama. Raises BadInputError, and
    PsiKvError where plain llama.cpp is not plain in this process.
    """
    options = {
        "n_threads_batch": os.cpu_count() or 1,  # filling the context is not what is measured
        "flash_attn": True,
        "verbose": False,
        **options,
    }
    if plain:
        import llama_cpp

        check_plain()
        return llama_cpp.Llama(model, **options)
    from psi_kv_governor.config import load_config
    from psi_kv_governor.llama import GovernedLlama

    return GovernedLlama(model, config=load_config(**settings), auto=auto, **options)


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


def exit_status(run: Callable[[], None]) -> int:
    """Of a process that holds a model and does `run`. A failure is said in one line on standard error."""
    try:
        run()
    except BrokenPipeError:  # nobody listens any more
        return 1
    except PsiKvError as error:
        print(error, file=sys.stderr)
        return error.exit_status
    except ModuleNotFoundError as error:
        print(f"this needs {error.name}: pip install 'psi-kv-governor[llama]'", file=sys.stderr)
        return PsiKvError.exit_status
    return 0
