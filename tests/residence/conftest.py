"""What the tests of residence share: a place on a real disk, and filesystems made for one test."""

import contextlib
import itertools
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from psi_kv_governor.residence import Place, check_place
from psi_kv_governor.residence.storage import storage_of
from waiting import until

Mount = Callable[..., contextlib.AbstractContextManager[Path]]


@pytest.fixture(scope="session")
def disk(tmp_path_factory) -> Iterator[Path]:
    """A folder on a disk: /tmp may be memory. This process has it alone, and it is empty."""
    ours = Path(__file__).parents[2] / "out" / f"residence-tests-{os.getpid()}"
    for folder in (tmp_path_factory.mktemp("disk"), ours):
        if not storage_of(folder).refused:
            folder.mkdir(parents=True, exist_ok=True)
            yield folder
            shutil.rmtree(ours, ignore_errors=True)
            return
    pytest.skip("neither the temporary folder nor this checkout lies on a disk of this machine")


@pytest.fixture
def place(disk) -> Place:
    found = check_place(str(disk), "the test", reserve_bytes=0)
    assert isinstance(found, Place), found
    return found


@pytest.fixture
def mounted(tmp_path) -> Mount:
    """Mounts filesystems at folders of their own."""
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")
    numbers = itertools.count()

    @contextlib.contextmanager
    def mount(kind: str, *options: str, source: str = "none") -> Iterator[Path]:
        point = tmp_path / f"{kind}-{next(numbers)}"
        point.mkdir()
        done = subprocess.run(
            ["mount", "-t", kind, *options, source, str(point)], capture_output=True, text=True, check=False
        )
        if done.returncode:
            pytest.skip(f"mounting {kind} is not allowed here: {done.stderr.strip()}")
        try:
            yield point
        finally:
            unmount(point)

    return mount


def unmount(point: Path) -> None:
    """A loop device lets go of its file some time after it was unmounted itself: when the last copy of its
    mount has gone. A program that another test starts with mounts of its own has one until it ends."""
    until(
        lambda: subprocess.run(["umount", str(point)], capture_output=True, check=False).returncode == 0,
        f"{point} can't be unmounted",
    )
