"""The mount table is read once for the whole package, and lines that mean nothing are left out."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from psi_kv_governor.kernel.mountinfo import Mount, mount_of, mounts, parse_mounts

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
    ("path", "point"),
    [
        ("/", "/"),
        ("/tmp-not", "/"),
        ("/tmp", "/tmp"),
        ("/tmp/a/b", "/tmp"),
        ("/tmp/on disk/a", "/tmp/on disk"),
        ("/home/me/.cache", "/home"),
    ],
)
def test_the_longest_mount_point_above_counts(proc, path, point):
    assert mount_of(Path(path), proc).point == point


def test_every_field_is_told_without_its_escapes():
    line = r"36 35 98:0 /mnt1 /a\040b\134c rw,noexec master:1 - overlay o\011v rw,upperdir=/x\054y/z,index"
    assert parse_mounts(line) == [
        Mount(
            number="98:0",
            root="/mnt1",
            point="/a b\\c",
            options=frozenset({"rw", "noexec"}),
            fs_type="overlay",
            device="o\tv",
            details={"rw": "", "upperdir": "/x,y/z", "index": ""},
        )
    ]


def test_a_mount_table_that_cant_be_read_is_empty(tmp_path):
    assert mounts(tmp_path) == []
    assert mount_of(Path("/"), tmp_path) is None


@given(st.text())
def test_any_text_is_survived(text):
    assert all(mount.fs_type == mount.fs_type.strip(" ") for mount in parse_mounts(text))
