"""What the store's tests share: a tag, a store on real storage, and a tiny disk of its own."""

import contextlib
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from store_help import open_store_as

from psi_kv_governor.store.base import BlobTag
from psi_kv_governor.store.disk import DiskStore
from psi_kv_governor.store.mounts import memory_backed

TAG = BlobTag(model="m", library="llama.cpp 1", layout="f16", start=64, stop=128)


@pytest.fixture
def tag() -> BlobTag:
    return TAG


@pytest.fixture(scope="session")
def disk(tmp_path_factory) -> Path:
    """A folder on storage: /tmp may be memory, and there the store refuses to work."""
    folder = tmp_path_factory.mktemp("disk")
    if not memory_backed(folder):
        return folder
    folder = Path(__file__).parents[2] / "out" / "store-tests"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture
def folder(disk, request) -> Iterator[Path]:
    """A fresh folder for one test."""
    path = disk / f"{os.getpid()}-{abs(hash(request.node.nodeid))}"
    path.mkdir(mode=0o700)
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture(params=["O_DIRECT", "buffered"])
def store(folder, request) -> Iterator[DiskStore]:
    """A store that takes its bytes past the page cache, or through it, whatever the filesystem prefers."""
    made = open_store_as(folder, request.param)
    yield made
    made.close()


@pytest.fixture
def tiny_disk(tmp_path) -> Callable[..., contextlib.AbstractContextManager[Path]]:
    """Mounts an ext4 image of 8 MiB; `read_only=True` mounts the same one so that nothing can be written."""
    if os.geteuid() != 0 or shutil.which("mkfs.ext4") is None:
        pytest.skip("a disk of its own needs root and mkfs.ext4")
    image = tmp_path / "disk.img"
    with image.open("wb") as file:
        file.truncate(8 << 20)
    subprocess.run(["mkfs.ext4", "-q", "-m", "0", image], check=True)

    @contextlib.contextmanager
    def mounted(*, read_only: bool = False) -> Iterator[Path]:
        point = tmp_path / "mnt"
        point.mkdir(exist_ok=True)
        options = "loop,ro" if read_only else "loop"
        done = subprocess.run(
            ["mount", "-o", options, image, point], capture_output=True, text=True, check=False
        )
        if done.returncode != 0:
            pytest.skip(f"loop devices cannot be mounted here: {done.stderr.strip()}")
        try:
            yield point
        finally:
            # Lazily: also where a failed test left a store open, the disk goes when its last file does.
            subprocess.run(["umount", "--lazy", point], check=True)

    return mounted
