"""What a folder lies on, down to the device: a disk, or memory or a distant machine under another name."""

from __future__ import annotations

import contextlib
import os
import re
import struct
from pathlib import Path
from typing import NamedTuple

from psi_kv_governor.kernel.mountinfo import Mount, mount_of

_MEMORY_TYPES = frozenset({"tmpfs", "ramfs", "devtmpfs", "hugetlbfs", "rootfs"})
_REMOTE_TYPES = frozenset(
    {"9p", "afs", "ceph", "cifs", "coda", "glusterfs", "gpfs", "lustre", "nfs", "nfs4", "smb3", "virtiofs"}
)
_MEMORY_DEVICES = re.compile(r"(zram|ram)\d+")
_REMOTE_DEVICES = re.compile(r"(nbd|rbd|drbd)\d+")
_FIEMAP = 0xC020660B  # FS_IOC_FIEMAP, <linux/fiemap.h>
_WHOLE_FILE = struct.pack("=QQIIII", 0, 2**64 - 1, 0, 0, 0, 0)  # struct fiemap with room for no extent
_DEEPEST = 8  # filesystems and devices on top of each other: more is a circle

_MEMORY = "is memory itself, so parking there returns nothing"
_REMOTE = "the kernel can't count on another machine when it has no memory left"


class Storage(NamedTuple):
    """What lies under a folder."""

    device: str
    """In words: `ext4 on vda`, `overlay over xfs on dm-0 over sdb`."""
    fs_type: str = ""
    """The filesystem that really holds the files: of an overlay the upper layer's, where it can be seen."""
    refused: str = ""
    """Name of what can't hold parked bytes (`tmpfs`, `zram`, `fuse`, `nfs`, ...); empty where all is well."""
    why: str = ""
    """Why it can't, in one clause."""


class Kernel(NamedTuple):
    """Where the kernel's own folders are: tests give others."""

    proc: Path = Path("/proc")
    sys: Path = Path("/sys")


HERE = Kernel()


def storage_of(folder: Path, kernel: Kernel = HERE) -> Storage:
    """What `folder` lies on, followed through overlays, loop devices and device-mapper stacks."""
    return _of_path(folder, kernel, _DEEPEST)


def memory_backed(folder: Path, kernel: Kernel = HERE) -> str:
    """Why writing to `folder` would give no memory back; empty when it lies on storage."""
    storage = storage_of(folder, kernel)
    return storage.why if storage.refused in _MEMORY_TYPES | {"zram", "ram"} else ""


def _of_path(path: Path, kernel: Kernel, depth: int) -> Storage:
    mount = mount_of(path, kernel.proc)
    if mount is None:
        return Storage("unknown")  # no mount table: nothing is held against a folder
    return _of_mount(mount, path, kernel, depth)


def _of_mount(mount: Mount, path: Path, kernel: Kernel, depth: int) -> Storage:
    kind, point = mount.fs_type, mount.point
    if depth <= 0:
        return Storage(kind, kind, "unknown", f"what lies under {point} goes round in a circle")
    if kind in _MEMORY_TYPES:
        return Storage(kind, kind, kind, f"{point} is a {kind}, which {_MEMORY}")
    if kind in _REMOTE_TYPES:
        return Storage(kind, kind, kind, f"{point} is mounted by {kind}: {_REMOTE}")
    if kind == "fuse" or kind.startswith("fuse.") or kind == "fuseblk":
        why = "is served by a program (FUSE), which may need memory itself before it can take any"
        return Storage(kind, kind, "fuse", f"{point} {why}")
    if kind == "overlay":
        return _of_overlay(mount, path, kernel, depth)
    below = [_of_device(name, kernel, depth - 1) for name in _device_names(mount, kernel)]
    return _on(kind, below, point) if below else Storage(kind, kind)


def _on(top: str, below: list[Storage], point: str) -> Storage:
    """`top` over several devices: the first that can't be used decides."""
    device = f"{top} on {' and '.join(storage.device for storage in below)}"
    for storage in below:
        if storage.refused:
            return Storage(device, top, storage.refused, f"{point} lies on {storage.why}")
    return Storage(device, top)


def _of_overlay(mount: Mount, path: Path, kernel: Kernel, depth: int) -> Storage:
    """An overlay writes into its upper layer; in a container that folder usually can't be seen."""
    upper = mount.details.get("upperdir")
    if upper is None:
        return Storage(
            "overlay", "overlay", "read-only", f"{mount.point} is an overlay without an upper layer"
        )
    if _same_filesystem(path, Path(upper)):
        below = _of_path(Path(upper), kernel, depth - 1)
        why = f"{mount.point} is an overlay over {below.why}" if below.refused else ""
        return Storage(f"overlay over {below.device}", below.fs_type, below.refused, why)
    if _has_extents(path):
        return Storage("overlay over a disk that can't be seen from here", "overlay")
    why = f"{mount.point} is an overlay, and its upper layer {upper} shows no blocks on a disk"
    return Storage("overlay", "overlay", "overlay", f"{why}: it may be memory")


def _same_filesystem(path: Path, upper: Path) -> bool:
    """Whether `upper` is the overlay's own: statfs(2) of an overlay tells the figures of its upper layer.

    In a container the path may be another folder of the same name.
    """
    try:
        here, there = os.statvfs(_existing(path)), os.statvfs(upper)
    except OSError:
        return False
    return (here.f_blocks, here.f_frsize, here.f_files) == (there.f_blocks, there.f_frsize, there.f_files)


def _has_extents(path: Path) -> bool:
    """Whether a file here has places on a disk: memory filesystems know no FIEMAP, and overlays ask below."""
    import fcntl  # not everywhere

    try:
        descriptor = os.open(_existing(path), os.O_RDWR | os.O_TMPFILE | os.O_CLOEXEC, 0o600)
    except OSError:
        return False
    try:
        fcntl.ioctl(descriptor, _FIEMAP, bytearray(_WHOLE_FILE))
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return True


def _existing(path: Path) -> Path:
    """`path`, or the nearest folder above it that is there."""
    return next((part for part in (path, *path.parents) if part.exists()), path)


# -- block devices -----------------------------------------------------------------------------------------


def _device_names(mount: Mount, kernel: Kernel) -> list[str]:
    """Names under /sys/class/block of what a filesystem lies on; none where it has no block device."""
    number = mount.number
    if number.startswith("0:"):  # btrfs and others that number their own volumes
        if not mount.device.startswith("/dev/"):
            return []
        with contextlib.suppress(OSError):
            found = Path(mount.device).stat().st_rdev
            number = f"{os.major(found)}:{os.minor(found)}"
    device = kernel.sys / "dev/block" / number
    # Where sysfs doesn't know it, the mount's own word has to do.
    name = device.resolve().name if device.exists() else Path(mount.device).name
    for pool in kernel.sys.glob("fs/btrfs/*/devices"):
        members = [member.name for member in pool.iterdir()]
        if name in members:
            return members
    return [name]


def _of_device(name: str, kernel: Kernel, depth: int) -> Storage:
    if depth <= 0:
        return Storage(name, "", "unknown", f"{name}, whose devices go round in a circle")
    if refused := _by_name(name):
        return refused
    folder = kernel.sys / "class/block" / name
    if name.startswith("loop"):
        return _of_loop(name, folder, kernel, depth)
    whole = folder if (folder / "slaves").is_dir() else Path(os.path.realpath(folder)).parent  # a partition
    if refused := _by_name(whole.name):
        return refused
    try:
        slaves = sorted(slave.name for slave in (whole / "slaves").iterdir())
    except OSError:
        slaves = []
    below = [_of_device(slave, kernel, depth - 1) for slave in slaves]
    device = f"{name} over {' and '.join(storage.device for storage in below)}" if below else name
    worst = next((storage for storage in below if storage.refused), Storage(device))
    return Storage(device, "", worst.refused, f"{name} over {worst.why}" if worst.refused else "")


def _by_name(name: str) -> Storage | None:
    """Devices whose name says that they are no disk of this machine."""
    if match := _MEMORY_DEVICES.fullmatch(name):
        return Storage(name, "", match[1], f"{name}, which {_MEMORY}")
    if match := _REMOTE_DEVICES.fullmatch(name):
        return Storage(name, "", match[1], f"{name}, a disk over the network: {_REMOTE}")
    return None


def _of_loop(name: str, folder: Path, kernel: Kernel, depth: int) -> Storage:
    whole = Path(re.sub(r"(?<=\d)p\d+$", "", str(folder)))  # loop0p1 is a partition of loop0
    try:
        backing = (whole / "loop/backing_file").read_text().rstrip("\n")
    except OSError:
        return Storage(name, "", "loop", f"{name}, whose file can't be seen from here: it may be in memory")
    below = _of_path(Path(backing.removesuffix(" (deleted)")), kernel, depth - 1)
    device = f"{name} in a file on {below.device}"
    return Storage(device, "", below.refused, f"{name}, whose file {backing} is no better: {below.why}")
