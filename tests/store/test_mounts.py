"""A folder in memory is told from a folder on a disk."""

from pathlib import Path

import pytest

from psi_kv_governor.errors import BadInputError
from psi_kv_governor.store.disk import DiskStore
from psi_kv_governor.store.mounts import memory_backed

MEMORY = "which is memory itself, so parking there returns nothing"
TABLE = """\
22 1 254:0 / / rw,relatime - ext4 /dev/vda rw
23 22 0:24 / /tmp rw,nosuid shared:5 - tmpfs tmpfs rw
24 23 254:1 / /tmp/on\\040disk rw shared:6 master:2 - xfs /dev/sda1 rw
25 22 0:25 / /var/cache rw - ext4 /dev/sda2 rw
26 22 0:26 / /var/cache rw - ramfs none rw
27 22 252:1 / /scratch rw - ext4 /dev/zram1 rw
28 22 0:30 / /home rw - btrfs /dev/sdb1 rw
a line that means nothing
29 22 0:31 / /late - tmpfs
"""


@pytest.fixture
def proc(tmp_path) -> Path:
    (tmp_path / "self").mkdir()
    (tmp_path / "self" / "mountinfo").write_text(TABLE)
    return tmp_path


@pytest.mark.parametrize(
    ("path", "why"),
    [
        ("/tmp/a", "/tmp is a tmpfs, which is memory itself, so parking there returns nothing"),
        (
            "/var/cache/x",
            "/var/cache is a ramfs, which is memory itself, so parking there returns nothing",
        ),  # mounted over the ext4
        ("/scratch/x", "/scratch lies on zram1, which is memory itself, so parking there returns nothing"),
        ("/tmp/on disk/x", ""),
        ("/home", ""),
    ],
)
def test_memory_under_another_name_is_told(proc, path, why):
    assert memory_backed(Path(path), proc) == why


def test_without_a_mount_table_nothing_is_held_against_a_folder(tmp_path):
    assert memory_backed(Path("/tmp"), tmp_path / "nothing") == ""


def test_a_store_in_memory_is_refused(folder, tmp_path):
    (tmp_path / "self").mkdir()
    (tmp_path / "self" / "mountinfo").write_text(f"1 0 0:1 / {folder.resolve()} rw - tmpfs tmpfs rw\n")
    with pytest.raises(BadInputError, match=r"returns nothing: .* is a tmpfs"):
        DiskStore(folder, 1 << 20, 0, proc=tmp_path)


def test_this_machines_shared_memory_is_refused():
    if not (shm := Path("/dev/shm")).is_dir():
        pytest.skip("this machine has no /dev/shm")
    with pytest.raises(BadInputError, match="returns nothing"):
        DiskStore(shm, 1 << 20, 0)
    assert memory_backed(shm) != ""
