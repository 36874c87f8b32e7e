"""A sandbox: a memory cgroup with a limit, and if wanted a swap device, that always goes away again.

Memory pressure is only ever made inside one. It is owned by a guardian process (`guardian.py`), which
kills what runs in the sandbox and removes it when this process closes it, crashes or is killed.
"""

from __future__ import annotations

import os
import secrets
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec

from psi_kv_governor.children import python_command
from psi_kv_governor.errors import BadInputError, PsiKvError
from psi_kv_governor.pressure.cgroup import Cgroup, OwnCgroups, find_cgroups
from psi_kv_governor.pressure.headroom import HeadroomReader
from psi_kv_governor.sandbox import cgroups, guardian, zram

Swap = Literal["zram", "none"]
"""A zram device of the sandbox's own, or no swap."""

LEAST_BYTES = 16 << 20
"""Smallest limit: a Python interpreter does not start in less."""

_CLOSE_TIMEOUT_S = 60.0

# Joins every group (as many as $1 says), then becomes the program: nothing of it runs outside.
_JOIN = 'set -e; n=$1; shift; while [ "$n" -gt 0 ]; do echo $$ > "$1"; shift; n=$((n-1)); done; exec "$@"'


class Sandbox:
    """A memory cgroup of `limit_bytes`, with a zram device of `swap_bytes` to swap to; 0: it may not swap.

    A context manager. Raises BadInputError for sizes that make no sense, PsiKvError where none can be
    made here (see `available`) or where the machine has not the memory to fill it.
    """

    def __init__(self, limit_bytes: int, *, swap_bytes: int = 0) -> None:
        swap_bytes = _checked_swap(limit_bytes, swap_bytes)
        _check_headroom(limit_bytes + swap_bytes)
        # A name that was never used: removing a group kills what is in it.
        name = f"psi-kv-sandbox-{os.getpid()}-{secrets.token_hex(4)}"
        self.group = cgroups.find_place().below(name)
        """The cgroup: its use, its kills and its folders."""
        self._children: list[subprocess.Popen[bytes]] = []
        self._zram: int | None = None
        words = map(str, (os.getpid(), name, limit_bytes, swap_bytes))
        self._guardian: subprocess.Popen[bytes] | None = subprocess.Popen(
            python_command(guardian.__name__, *words),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C in the terminal is for the parent
        )
        try:
            assert self._guardian.stdout is not None, "started with a pipe"
            line = self._guardian.stdout.readline()
            if not line:
                raise PsiKvError("the process that owns the sandbox did not start: see its message above")
            told = msgspec.json.decode(line, type=guardian.Told)
            if told.problem:
                raise PsiKvError(told.problem)
            self._zram = told.zram
        except BaseException:
            self._dismiss()
            raise

    @staticmethod
    def available(swap: Swap = "none") -> tuple[bool, str]:
        """Whether a sandbox can be made here, and if not why, with what to do."""
        try:
            cgroups.find_place()
        except PsiKvError as error:
            return False, str(error)
        why = zram.why_not() if swap == "zram" else ""
        return not why, why

    @property
    def pressure_file(self) -> Path | None:
        """The sandbox's own `memory.pressure`; None where no cgroup v2 is to be had."""
        return None if self.group.unified is None else self.group.unified / "memory.pressure"

    def popen(self, argv: Sequence[str], **options: Any) -> subprocess.Popen[bytes]:
        """Start a program inside; `options` are those of subprocess.Popen.

        It joins before it becomes the program. Exit status 2 and a line of the shell mean that it could not.
        """
        procs = [str(folder / "cgroup.procs") for folder in self.group.folders]
        child: subprocess.Popen[bytes] = subprocess.Popen(
            ["/bin/sh", "-c", _JOIN, "sh", str(len(procs)), *procs, *argv], **options
        )
        self._children.append(child)
        return child

    def own_cgroups(self) -> OwnCgroups:
        """Its cgroup as if it had no ancestors: what is around it has no part in what is measured."""
        own = Cgroup(self.group.version, self.group.memory, self.group.memory)
        return OwnCgroups(own, None) if own.version == 2 else OwnCgroups(None, own)

    def close(self) -> None:
        """Kill what runs in it and remove it. Safe to call twice.

        Raises PsiKvError, naming it, when something could not be removed.
        """
        problem = self._dismiss()
        for child in self._children:
            child.wait()
        self._children.clear()
        if problem:
            raise PsiKvError(f"the sandbox could not be removed whole, remove it yourself: {problem}")

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _dismiss(self) -> str:
        """Have the guardian end. Gives what is left behind; does its work where it was killed itself."""
        if self._guardian is None:
            return ""
        owner, self._guardian = self._guardian, None
        said, _ = owner.communicate(timeout=_CLOSE_TIMEOUT_S)
        if not said:
            return guardian.remove(self.group, self._zram)
        return msgspec.json.decode(said, type=guardian.Told).problem


def _checked_swap(limit_bytes: int, swap_bytes: int) -> int:
    """Size of the swap device, in whole pages."""
    if limit_bytes < LEAST_BYTES:
        raise BadInputError(f"limit_bytes = {limit_bytes} is not usable: give {LEAST_BYTES} or more")
    if swap_bytes and swap_bytes < LEAST_BYTES:
        raise BadInputError(f"swap_bytes = {swap_bytes} is not usable: give 0, or {LEAST_BYTES} or more")
    page_bytes = os.sysconf("SC_PAGE_SIZE")
    return -(-swap_bytes // page_bytes) * page_bytes


def _check_headroom(wanted_bytes: int) -> None:
    """A full sandbox must not bring the machine, or the cgroup around it, into need."""
    found = HeadroomReader(find_cgroups()).read()
    if found is not None and found.headroom_bytes < wanted_bytes:
        raise PsiKvError(
            f"the sandbox may take {wanted_bytes >> 20} MiB, {found.headroom_bytes >> 20} MiB are available: "
            "close other programs, or choose a smaller limit and less swap"
        )


def drop_file_cache(path: str | Path) -> None:
    """Forget the file's pages, so that they are read, and charged, by whoever needs them next (page cache
    belongs to the cgroup that touches it first). Pages that another process has mapped stay where they are,
    and so do dirty ones."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)
