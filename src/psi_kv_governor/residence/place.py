"""Which folder holds parked bytes: plain functions, plain results."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import msgspec

from psi_kv_governor.kernel.mountinfo import mount_of
from psi_kv_governor.residence.files import PROBE_BYTES, own_folder_name, try_out
from psi_kv_governor.residence.storage import HERE, Kernel, storage_of
from psi_kv_governor.residence.witness import found_before, held_bytes, memory_behind

RESERVE_BYTES = 512 << 20
"""Free space that is left on the disk unless told otherwise."""

NO_PLACE = "none"
"""The setting `place` of whoever wants nothing parked: what is given up then is evicted."""

WAY_OUT = "name a folder on a disk by place (PSI_KV_PLACE), or mount one, e.g. at /var/tmp"


class Refusal(msgspec.Struct, frozen=True, kw_only=True):
    """A folder that can't be used."""

    name: str
    """What refused it: `tmpfs`, `zram`, `memory`, `fuse`, `nfs`, `read-only`, `not ours`, `full`, ..."""
    folder: str
    why: str
    way_out: str = WAY_OUT


class Place(msgspec.Struct, frozen=True, kw_only=True):
    """A folder, ours and only ours, that can hold parked bytes."""

    folder: str
    device: str
    """What it lies on: `ext4 on vda`."""
    fs_type: str
    """The filesystem that really holds the files; `overlay` where that can't be seen."""
    free_bytes: int
    """What may be taken now: the free space less the reserve, and at most the limit."""
    write_bytes_per_s: float
    """Measured when the folder was opened, for 0.3 s at the most; 0 where nothing could be written."""
    why: str
    """Why this folder: who named it."""
    limit_bytes: int = 8 << 30
    """Most that the files of one process may take here."""
    reserve_bytes: int = RESERVE_BYTES
    """Free space that is always left to others."""
    tmpfile: bool = True
    """Whether files are without a name from birth (O_TMPFILE), and not only from the next moment on."""
    runs_programs: bool = True
    """Whether the compiled agent can lie here too; not where it is mounted noexec. Parking doesn't mind."""


class Search(msgspec.Struct, frozen=True, kw_only=True):
    """The best place there is, and what was refused before it was found."""

    place: Place | None
    refused: tuple[Refusal, ...] = ()

    @property
    def why_none(self) -> str:
        """Why there is no place and what to do, in one line; empty where there is one."""
        if self.place is not None:
            return ""
        reasons = "; ".join(f"{refusal.folder}: {refusal.why}" for refusal in self.refused)
        return f"no folder can hold parked bytes ({reasons}): {WAY_OUT}"


def find_place(
    setting: str = "",
    *,
    limit_bytes: int = 8 << 30,
    reserve_bytes: int = RESERVE_BYTES,
    environ: Mapping[str, str] | None = None,
    kernel: Kernel = HERE,
) -> Search:
    """The folder in which parked bytes live. Never raises for what a machine is like.

    Where `setting` names a folder, that one or none; `none` is none. Else the first usable of: the service
    manager's cache and state folders, the user's cache, TMPDIR, /var/tmp, /tmp.
    """
    if setting == NO_PLACE:
        return Search(
            place=None, refused=(Refusal(name="setting", folder="place = none", why="as was asked"),)
        )
    if sys.platform != "linux":
        why = f"files that the kernel can take pages from are known on Linux, and not on {sys.platform}"
        return Search(place=None, refused=(Refusal(name="system", folder=setting, why=why),))
    refused: list[Refusal] = []
    environ = os.environ if environ is None else environ
    candidates = [(setting, "the setting place")] if setting else list(_candidates(environ))
    for parent, why in candidates:
        try:
            found = check_place(parent, why, limit_bytes, reserve_bytes, kernel)
        except (OSError, ValueError) as error:  # ValueError: a NUL in a name
            found = Refusal(name="unusable", folder=parent, why=str(error))
        if isinstance(found, Place):
            return Search(place=found, refused=tuple(refused))
        refused.append(found)
    return Search(place=None, refused=tuple(refused))


def check_place(
    parent: str,
    why: str,
    limit_bytes: int = 8 << 30,
    reserve_bytes: int = RESERVE_BYTES,
    kernel: Kernel = HERE,
) -> Place | Refusal:
    """Make our folder in `parent` (and `parent` too where it is absent), and look whether it will do."""
    # Absolute and without links: what is checked is what is used.
    top = Path(os.path.realpath(os.path.expanduser(parent)))  # noqa: PTH111
    folder = str(top / own_folder_name())

    def refuse(name: str, reason: str) -> Refusal:
        return Refusal(name=name, folder=folder, why=reason)

    storage = storage_of(top, kernel)
    if storage.refused:
        return refuse(storage.refused, storage.why)
    try:
        top.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        return refuse(_name_of(error), f"it can't be made: {error.strerror}")
    storage = storage_of(top, kernel)  # an overlay answers for folders that are there only
    try:
        held = held_bytes()
        tmpfile, speed = try_out(folder)
        memory = _counted_as_memory(folder, held_bytes() - held)
        room = os.statvfs(folder)
    except PermissionError as error:
        ours = "it can't be written to" if error.strerror == "Permission denied" else error.strerror
        return refuse("not ours" if os.path.lexists(folder) else "forbidden", ours or "")
    except OSError as error:
        return refuse(_name_of(error), f"no file can be made: {error.strerror}")
    free_bytes = min(limit_bytes, room.f_bavail * room.f_frsize - reserve_bytes)
    if memory or free_bytes <= 0:
        full = f"less than the reserve of {reserve_bytes >> 20} MiB is free"
        return refuse("memory", memory) if memory else refuse("full", full)
    mount = mount_of(top, kernel.proc)
    return Place(
        folder=folder,
        device=storage.device,
        fs_type=storage.fs_type,
        free_bytes=free_bytes,
        write_bytes_per_s=speed,
        why=why,
        limit_bytes=limit_bytes,
        reserve_bytes=reserve_bytes,
        tmpfile=tmpfile,
        runs_programs=not (mount and "noexec" in mount.options),
    )


def _counted_as_memory(folder: str, rise_bytes: int) -> str:
    """Why what was tried out there stayed in memory, whatever the folder's names say; '' where it did not."""
    rose = rise_bytes >= PROBE_BYTES // 2
    return found_before(folder) or (memory_behind(folder) if rose else "")


def _candidates(environ: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Folders that may hold ours, in order, with who named them."""
    for name in ("CACHE_DIRECTORY", "STATE_DIRECTORY"):
        if first := environ.get(name, "").partition(":")[0]:
            yield first, f"{name} of the service manager"
    if cache := environ.get("XDG_CACHE_HOME"):
        yield cache, "XDG_CACHE_HOME"
    elif home := _home(environ):
        yield str(Path(home) / ".cache"), "the user's cache"
    if temporary := environ.get("TMPDIR"):
        yield temporary, "TMPDIR"
    yield "/var/tmp", "/var/tmp, as no folder was named"
    yield "/tmp", "/tmp, as no folder was named"


def _home(environ: Mapping[str, str]) -> str:
    """The user's home; empty for a user without one (a random UID in a container, HOME=/)."""
    home = environ.get("HOME", "")
    if not home:
        try:
            import pwd  # not everywhere

            home = pwd.getpwuid(os.geteuid()).pw_dir
        except (ImportError, KeyError):
            return ""
    return home if Path(home) != Path("/") and Path(home).is_absolute() else ""


def _name_of(error: OSError) -> str:
    names = {
        errno.EROFS: "read-only",
        errno.EACCES: "forbidden",
        errno.EPERM: "forbidden",
        errno.ENOENT: "absent",
        errno.ENOSPC: "full",
        errno.EDQUOT: "full",
    }
    return names.get(error.errno or 0, "unusable")
