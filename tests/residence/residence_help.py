"""Steps that the tests of residence repeat."""

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest


def ext4_image(folder: Path, n_bytes: int) -> str:
    """A file with an ext4 in it."""
    if shutil.which("mkfs.ext4") is None:
        pytest.skip("there is no mkfs.ext4")
    image = folder / "disk.img"
    with image.open("wb") as file:
        file.truncate(n_bytes)
    subprocess.run(["mkfs.ext4", "-q", "-F", "-m", "0", "-O", "^has_journal", str(image)], check=True)
    return str(image)


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
