"""A disk is told from memory, a distant machine or a program's filesystem, however many layers hide it."""

import os
from pathlib import Path

import pytest
from residence_help import ext4_image

from psi_kv_governor.residence import Refusal, check_place
from psi_kv_governor.residence.storage import Kernel, storage_of


def refused(folder: Path) -> Refusal:
    found = check_place(str(folder), "the test")
    assert isinstance(found, Refusal), found
    assert "place" in found.way_out
    assert "\n" not in found.why
    return found


def test_a_real_tmpfs_is_refused_by_name(mounted):
    with mounted("tmpfs") as point:
        found = refused(point / "not there yet")
        assert (found.name, f"{point} is a tmpfs" in found.why) == ("tmpfs", True)


def test_an_overlay_whose_upper_layer_is_in_memory_is_refused(mounted, disk):
    with mounted("tmpfs") as layer:
        for name in ("upper", "work"):
            (layer / name).mkdir()
        options = f"lowerdir={disk},upperdir={layer}/upper,workdir={layer}/work"
        with mounted("overlay", "-o", options) as point:
            found = refused(point)
            assert found.name == "tmpfs"
            assert f"{point} is an overlay over {layer} is a tmpfs" in found.why


def test_an_overlay_over_a_disk_is_a_disk(mounted, disk):
    for name in ("upper", "work", "lower"):
        (disk / name).mkdir(exist_ok=True)
    options = f"lowerdir={disk}/lower,upperdir={disk}/upper,workdir={disk}/work"
    with mounted("overlay", "-o", options) as point:
        storage = storage_of(point)
        assert storage.refused == ""
        assert storage.fs_type == storage_of(disk).fs_type
        assert storage.device == f"overlay over {storage_of(disk).device}"


@pytest.mark.parametrize("in_memory", [True, False])
def test_an_overlay_whose_upper_layer_cant_be_seen_is_asked_for_blocks(mounted, disk, tmp_path, in_memory):
    """As in a container, where the path of the upper layer is the host's."""
    table = tmp_path / "proc" / "self" / "mountinfo"
    table.parent.mkdir(parents=True)
    with mounted("tmpfs") as memory:
        point = memory if in_memory else disk
        table.write_text(f"1 0 0:9 / {point} rw - overlay overlay rw,upperdir=/nowhere/upper\n")
        storage = storage_of(point, Kernel(proc=tmp_path / "proc"))
        assert storage.refused == ("overlay" if in_memory else "")


def test_a_disk_in_a_file_in_memory_is_refused(mounted):
    with mounted("tmpfs") as memory:
        image = ext4_image(memory, 8 << 20)
        with mounted("ext4", "-o", "loop", source=image) as point:
            found = refused(point)
            assert found.name == "tmpfs"
            assert image in found.why


def test_a_disk_in_a_file_on_a_disk_is_a_disk(mounted, disk):
    image = ext4_image(disk, 8 << 20)
    with mounted("ext4", "-o", "loop", source=image) as point:
        storage = storage_of(point)
        assert (storage.refused, storage.fs_type) == ("", "ext4")
        assert "in a file on" in storage.device


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("{id} 0:44 / /mnt rw - nfs4 server:/export rw", "nfs4"),
        ("{id} 0:44 / /mnt rw - cifs //server/share rw", "cifs"),
        ("{id} 0:44 / /mnt rw - 9p hostshare rw", "9p"),
        ("{id} 0:44 / /mnt rw - fuse.sshfs me@server: rw", "fuse"),
        ("{id} 0:44 / /mnt rw - ramfs none rw", "ramfs"),
        ("{id} 252:0 / /mnt rw - ext4 /dev/zram0 rw", "zram"),
        ("{id} 1:0 / /mnt rw - ext4 /dev/ram0 rw", "ram"),
        ("{id} 43:0 / /mnt rw - ext4 /dev/nbd0 rw", "nbd"),
        ("{id} 253:3 / /mnt rw - ext4 /dev/mapper/vg-lv rw", "zram"),
        ("{id} 259:2 / /mnt rw - ext4 /dev/zram1p1 rw", "zram"),
        ("{id} 7:0 / /mnt rw - ext4 /dev/loop0 rw", "loop"),
        ("{id} 0:50 / /mnt rw - btrfs /dev/sdz1 rw", "zram"),
        ("{id} 0:51 / /mnt rw - overlay overlay rw,lowerdir=/a", "read-only"),
        ("{id} 253:4 / /mnt rw - xfs /dev/mapper/disk rw", ""),
        ("{id} 8:1 / /mnt rw - ext4 /dev/sda1 rw", ""),
        ("{id} 0:60 / /mnt rw - zfs pool/data rw", ""),
    ],
)
def test_what_a_mount_lies_on_is_followed_down(tmp_path, line, name):
    """Kernels of this machine can't be made to have all of these: their own words are written down here."""
    kernel = Kernel(tmp_path / "proc", tmp_path / "sys")
    table = kernel.proc / "self/mountinfo"
    table.parent.mkdir(parents=True)
    table.write_text("1 0 8:1 / / rw - ext4 /dev/sda1 rw\n" + line.format(id="2 1") + "\n")
    block_device(kernel, "8:1", "sda/sda1")
    block_device(kernel, "252:0", "zram0")
    block_device(kernel, "1:0", "ram0")
    block_device(kernel, "43:0", "nbd0")
    block_device(kernel, "253:3", "dm-3", slaves=("dm-4", "zram0"))
    block_device(kernel, "253:4", "dm-4", slaves=("sda1",))
    block_device(kernel, "259:2", "zram1/zram1p1")
    block_device(kernel, "7:0", "loop0")
    pool = kernel.sys / "fs/btrfs/1-2-3/devices"
    for member in ("sdz1", "zram0"):
        (pool / member).mkdir(parents=True)
    assert storage_of(Path("/mnt/folder"), kernel).refused == name


def block_device(kernel: Kernel, number: str, path: str, slaves: tuple[str, ...] = ()) -> None:
    """As sysfs has it: a folder below `devices`, and links to it by name and by number."""
    folder = kernel.sys / "devices" / path
    (folder if "/" not in path else folder.parent).joinpath("slaves").mkdir(parents=True)
    folder.mkdir(exist_ok=True)
    for slave in slaves:
        (folder / "slaves" / slave).mkdir()
    for link in (kernel.sys / "class/block" / folder.name, kernel.sys / "dev/block" / number):
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(folder)


def test_devices_in_a_circle_end_in_a_refusal(tmp_path):
    kernel = Kernel(tmp_path / "proc", tmp_path / "sys")
    table = kernel.proc / "self/mountinfo"
    table.parent.mkdir(parents=True)
    table.write_text("1 0 253:0 / / rw - ext4 /dev/dm-0 rw\n")
    block_device(kernel, "253:0", "dm-0", slaves=("dm-0",))
    assert storage_of(Path("/"), kernel).refused == "unknown"


def test_the_root_of_this_machine_is_told_in_words():
    storage = storage_of(Path(os.sep))
    assert storage.fs_type
    assert storage.device
