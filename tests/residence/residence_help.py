"""Steps that the tests of residence repeat."""

import os
import shutil
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from psi_kv_governor.residence import Mapping
from waiting import until


def ext4_image(folder: Path, n_bytes: int) -> str:
    """A file with an ext4 in it."""
    if shutil.which("mkfs.ext4") is None:
        pytest.skip("there is no mkfs.ext4")
    image = folder / "disk.img"
    with image.open("wb") as file:
        file.truncate(n_bytes)
    subprocess.run(["mkfs.ext4", "-q", "-F", "-m", "0", "-O", "^has_journal", str(image)], check=True)
    return str(image)


def probes_end() -> None:
    """Of a disk that was slow just now the measurement goes on for a piece after it was given up, and its
    file of up to 4 MiB is there until then."""
    until(lambda: not [one for one in threading.enumerate() if one.name == "psi-kv-disk-probe"])


def in_child(body: Callable[[], str]) -> str:
    """Run `body` in a forked child, where privileges can be given up; gives what it returns."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            answer = body()
        except BaseException as error:
            answer = f"{type(error).__name__}: {error}"
        os.write(writer, answer.encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as answers:
        text = answers.read()
    os.waitpid(child, 0)
    return text


def filled(mapping: Mapping, seed: int = 1) -> np.ndarray:
    """Write all of it; gives a copy of what was written."""
    view = np.frombuffer(mapping.buffer, dtype=np.uint8)
    view[:] = np.random.default_rng(seed).integers(0, 256, len(view), dtype=np.uint8)
    return view.copy()


def now(mapping: Mapping) -> np.ndarray:
    return np.frombuffer(mapping.buffer, dtype=np.uint8)
