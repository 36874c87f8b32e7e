"""The surroundings: each the real thing, made for one run and gone after it."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from psi_kv_governor.errors import PsiKvError
from psi_kv_governor.sandbox.load import MIB
from psi_kv_governor.sandbox.sandbox import Sandbox
from psikv_bench.survival import boards, filtered
from psikv_bench.survival.around import Around

_MAPPED = """
import mmap, os, sys, tempfile, time
taken = os.urandom(1 << 20) * (int(sys.argv[3]) >> 20)  # of its own besides
with tempfile.TemporaryFile(dir=sys.argv[1]) as file:
    for _ in range(int(sys.argv[2])):
        file.write(os.urandom(1 << 20))
    file.flush(); os.fsync(file.fileno())
    view = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    print("begin", flush=True)
    while True:
        sum(view[i] for i in range(0, len(view), 4096))
        time.sleep(0.05)
"""
"""An index that is mapped and looked into everywhere, as vector databases do."""


def calm(around: Around) -> None:
    """Nothing at all."""


def hardened(around: Around) -> None:
    """A unit with DynamicUser, ProtectHome and the filter @system-service, which kills for mincore."""
    around.nobody()
    inner = around.wrap
    denied = ["mincore", "cachestat", "ptrace", "bpf", "mount"]
    around.wrap = lambda argv: filtered.command(inner(argv), deny=denied)
    around.mounts("mount -t tmpfs -o mode=0000 none /run")
    around.environ = {"HOME": "/nonexistent", "CACHE_DIRECTORY": str(around.folder)}


def random_user(around: Around) -> None:
    """A random user number without a name, HOME=/."""
    around.nobody()
    around.environ = {"HOME": "/", "TMPDIR": str(around.folder)}


def read_only(around: Around) -> None:
    """A read-only root without any folder to write to."""
    around.mounts("mount -o remount,ro,bind /", "mount -o remount,ro,bind /dev/shm")
    around.environ = {"HOME": "/nonexistent"}


def noexec(around: Around) -> None:
    """Every folder that can be written to mounted noexec."""
    around.mounts(
        f"mount --bind {around.folder} {around.folder}", f"mount -o remount,bind,noexec {around.folder}",
        "mount -t tmpfs -o noexec,mode=1777 none /dev/shm",
    )  # fmt: skip
    around.environ = {"HOME": str(around.folder), "TMPDIR": "/dev/shm"}


def no_compiler(around: Around) -> None:
    """An image without a C compiler, and nothing compiled before."""
    around.environ = {"CC": "no-such-compiler", "HOME": str(around.folder)}


def no_threads(around: Around) -> None:
    """TasksMax=1: no thread beside the model's own."""
    around.nobody()
    before = around.wrap
    around.wrap = lambda argv: ["prlimit", "--nproc=1:1", *before(argv)]
    around.environ = {"TMPDIR": str(around.folder), "HOME": "/"}


def no_files(around: Around) -> None:
    """LimitFSIZE=0: no file may grow."""
    around.wrap = lambda argv: ["prlimit", "--fsize=0:0", *argv]


def no_swap(around: Around) -> None:
    """A limit without swap, and a neighbour that takes what half of the cache holds, at 100 MB/s."""
    around.limited(around.short_bytes)
    around.ramp(100, 100.0)


def zram(around: Around) -> None:
    """The same with zram to swap to."""
    around.limited(around.short_bytes, swap_bytes=512 * MIB)
    around.ramp(100, 100.0)


def just_fits(around: Around) -> None:
    """A limit without swap, PSI hidden: plain llama.cpp and all that the neighbour takes just fit."""
    around.limited(around.need_bytes + 110 * MIB)
    around.ramp(100, 100.0)
    around.beside, around.neighbour = around.neighbour or [], None
    if Path("/proc/pressure").exists():
        nothing = around.folder / "nothing"
        nothing.mkdir()
        around.mounts(f"mount --bind {nothing} /proc/pressure")


_ALL_ELSE_READ_ONLY = "mount -o remount,ro,bind /"


def tmpfs(around: Around) -> None:
    """The same without swap, and every folder is memory."""
    no_swap(around)
    around.mounts(f"mount -t tmpfs -o mode=1777 none {around.folder}", _ALL_ELSE_READ_ONLY)
    around.environ = dict.fromkeys(("HOME", "XDG_CACHE_HOME", "TMPDIR"), str(around.folder))


def overlay(around: Around) -> None:
    """The same, and the only folder is an overlay whose upper layer is memory."""
    no_swap(around)
    here = around.folder
    around.mounts(
        f"mkdir -p {here}/lower {here}/seen && mount -t tmpfs none {here}/lower",
        f"mkdir {here}/lower/upper {here}/lower/work {here}/lower/low",
        f"mount -t overlay -o lowerdir={here}/lower/low,upperdir={here}/lower/upper,"
        f"workdir={here}/lower/work overlay {here}/seen",
        _ALL_ELSE_READ_ONLY,
    )
    around.environ = {"XDG_CACHE_HOME": f"{here}/seen", "HOME": f"{here}/seen", "TMPDIR": f"{here}/seen"}


def _image(around: Around, folder: str, mib: int) -> str:
    """Commands that mount a disk in a file of `folder`."""
    here = around.folder
    return (
        f"mkdir -p {here}/disk && truncate -s {mib}M {folder}/disk.img && "
        f"mkfs.ext4 -q -F -m 0 {folder}/disk.img && mount -o loop {folder}/disk.img {here}/disk && "
        f"chmod 1777 {here}/disk"
    )


def loop(around: Around) -> None:
    """The same, and the only folder is a disk in a file that lies in memory."""
    no_swap(around)
    around.mounts("mount -t tmpfs none /dev/shm", _image(around, "/dev/shm", 256), _ALL_ELSE_READ_ONLY)
    around.environ = dict.fromkeys(("XDG_CACHE_HOME", "HOME", "TMPDIR"), f"{around.folder}/disk")


def full_disk(around: Around) -> None:
    """The same, and the disk has 16 MiB."""
    no_swap(around)
    around.mounts(_image(around, str(around.folder), 16))
    around.settings = {"place_reserve_bytes": 0, "place": f"{around.folder}/disk"}


def slow_disk(around: Around, mb_per_s: int = 8, limit_bytes: int = 0) -> None:
    """A disk of 8 MB/s, and a neighbour of 25 MB/s, without swap."""
    around.limited(limit_bytes or around.short_bytes)
    around.ramp(100, 25.0)
    blkio = Path("/sys/fs/cgroup/blkio/blkio.throttle.write_bps_device")
    if not blkio.exists():
        raise PsiKvError("no blkio controller of cgroup v1 to slow a disk of one's own down")
    image = around.folder / "slow.img"
    with image.open("wb") as file:
        file.truncate(512 * MIB)
    subprocess.run(["mkfs.ext4", "-q", "-F", "-m", "0", str(image)], check=True)
    disk = around.folder / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-o", "loop", str(image), str(disk)], check=True)
    around.ending.callback(subprocess.run, ["umount", str(disk)], check=False)
    device = disk.stat().st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    blkio.write_text(f"{number} {mb_per_s * 1000 * 1000}")
    around.ending.callback(blkio.write_text, f"{number} 0")
    disk.chmod(0o1777)
    around.environ = dict.fromkeys(("XDG_CACHE_HOME", "HOME", "TMPDIR"), str(disk))
    around.settings = {"place_reserve_bytes": 0}


def slow_disk_and_room(around: Around, mb_per_s: int = 8) -> None:
    """A disk of 8 MB/s, and a neighbour of 25 MB/s that just fits beside the model, without swap."""
    slow_disk(around, mb_per_s, around.need_bytes + 110 * MIB + 24 * MIB)


def slowest_disk_and_room(around: Around) -> None:
    """The same with a disk of 2 MB/s."""
    slow_disk_and_room(around, 2)


def huge_pages(around: Around) -> None:
    """The scene with zram, and every mapping of malloc asks for huge pages (THP)."""
    zram(around)
    around.environ = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}


def mapped_files(around: Around) -> None:
    """A neighbour that maps a file of 200 MiB, in a limit with room for half of it."""
    around.limited(around.need_bytes + 180 * MIB)
    around.neighbour = [sys.executable, "-c", _MAPPED, str(around.folder), "200", "0"]


def mapped_index(around: Around) -> None:
    """A neighbour that maps an index of 200 MiB, all of it in memory, at 39 % headroom; nobody stalls."""
    limit_bytes = round((200 + 20) * MIB / 0.39)
    rest_bytes = limit_bytes - around.need_bytes - (220 + 10) * MIB
    around.limited(limit_bytes)
    around.neighbour = [sys.executable, "-c", _MAPPED, str(around.folder), "200", str(rest_bytes)]


def other_container(around: Around) -> None:
    """Another container that thrashes at its own limit."""
    around.limited(around.need_bytes + 260 * MIB)
    around.other = around.ending.enter_context(Sandbox(48 * MIB, swap_bytes=256 * MIB))
    around.ramp(120, 0.0)


def locked(around: Around) -> None:
    """Memory locked while it runs, and the neighbour of 100 MB/s in a limit with room for both."""
    around.limited(around.need_bytes + 200 * MIB)
    around.ramp(100, 100.0)
    around.locks = True


def frozen(around: Around) -> None:
    """Frozen for two seconds, and thawed."""
    around.limited(around.need_bytes + 260 * MIB)
    assert around.sandbox is not None, "it was made just now"
    pids = around.sandbox.group.pids

    @contextlib.contextmanager
    def freeze() -> Iterator[None]:
        there = [pid for pid in pids() if _is_subject(pid)]
        for number, pause_s in ((signal.SIGSTOP, 2.0), (signal.SIGCONT, 0.0)):
            for pid in there:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
            time.sleep(pause_s)
        yield

    around.during = freeze


def _is_subject(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return b"survival.subject" in Path(f"/proc/{pid}/cmdline").read_bytes()
    return False


SURROUNDINGS: dict[str, Callable[[Around], None]] = {
    one.__name__.replace("_", "-"): one
    for one in (
        calm, hardened, random_user, read_only, noexec, no_compiler, no_threads, no_files, no_swap, zram,
        tmpfs, overlay, loop, full_disk, slow_disk, slow_disk_and_room, slowest_disk_and_room, huge_pages,
        mapped_files, mapped_index, other_container, locked, frozen, just_fits,
        boards.earlyoom, boards.board, boards.board_with_room, boards.memory_high,
    )
}  # fmt: skip
"""By name; the docstring says what it is."""

QUICK = ("calm", "hardened", "noexec", "no-swap", "mapped-files")


def why_not(names: Sequence[str]) -> str:
    """Why they can't be made here; empty where they can."""
    able, why = Sandbox.available(
        "zram" if {"zram", "huge-pages", "other-container"} & set(names) else "none"
    )
    if not able:
        return why
    if os.geteuid() != 0:
        return "other users and mounts are for root alone"
    missing = [name for name in ("unshare", "setpriv", "prlimit", "mkfs.ext4") if not shutil.which(name)]
    return f"{missing[0]} is missing: apt install util-linux e2fsprogs" if missing else ""
