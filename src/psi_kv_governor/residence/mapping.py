"""Memory for an engine that allocates through us: any part of it can be parked, and reads as before.

Two ways (DESIGN.md): born in a file it is a shared mapping, and parking is writing back and dropping; nobody
has to stand still for that. Born in memory it is anonymous, and parking writes to a file and puts a private
mapping of that file in place, *while nobody writes to the part*.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import math
import threading
import time
import weakref
from collections.abc import Iterable, Sequence

import numpy as np

from psi_kv_governor.kernel import memory
from psi_kv_governor.kernel.memory import PAGE_BYTES
from psi_kv_governor.residence import forks, paging
from psi_kv_governor.residence.backing import Backing
from psi_kv_governor.residence.counting import dirty_bytes, in_memory, went
from psi_kv_governor.residence.parked_file import ParkedFile
from psi_kv_governor.residence.parts import Done, Part, batches, bytes_of, inward, runs_of
from psi_kv_governor.residence.place import Place

SLICE_BYTES = 1 << 20  # unit of work: between two of them time and bytes are looked at
_SYNC_BYTES = 16 << 20  # unit of writing back: the disk gets enough at once to work at its full speed
MOST_PIECES = 16_384
"""Mappings that parking may make in a process: beyond 65,530 (vm.max_map_count) nobody gets any more."""

NO_PLACE = "there is no folder that can hold parked bytes"


class Mapping:
    """`n_bytes` of zeroed memory, rounded up to whole pages; see the module for the two ways.

    Parts that are asked for are rounded inward to whole pages. Any thread may call; only one call works at
    a time. After a fork both processes have the same bytes, and neither sees what the other writes later.
    `why_not_file` is why it was not born in a file although that was asked for. Raises OSError on creation
    when not even address space is left.
    """

    def __init__(self, n_bytes: int, *, backing: Backing = "memory", place: Place | None = None) -> None:
        self.n_bytes = max(1, -(-n_bytes // PAGE_BYTES)) * PAGE_BYTES
        self.backing: Backing = "memory"
        self.why_not_file = "" if place else NO_PLACE
        self._place = place
        self._lock = threading.RLock()
        self._files: list[ParkedFile] = []
        self._of = np.zeros(self.n_bytes // PAGE_BYTES, dtype=np.uint8)
        """By page: 0 for anonymous memory, else 1 + index of the file it is mapped from."""
        self._shared = False
        self.pieces = 1
        """Mappings that it is made of, at most."""
        self._failed = ""
        self._closed, self.address = False, 0
        with forks.birth:
            if backing == "file" and place is not None:
                self._be_born_in_a_file(place)
            if not self.address:
                self.address = memory.map_memory(0, self.n_bytes, memory.ANONYMOUS)
            forks.enter(self)
        self.buffer = (ctypes.c_char * self.n_bytes).from_address(self.address)
        """For memoryview, numpy.frombuffer and torch.frombuffer, which keep it alive."""
        weakref.finalize(self.buffer, memory.unmap, self.address, self.n_bytes)
        memory.call_allowed("mincore")  # found out now, and not under pressure
        memory.call_allowed("cachestat")

    def _be_born_in_a_file(self, place: Place) -> None:
        try:
            file = ParkedFile(place, self.n_bytes)
            file.reserve(0, self.n_bytes, exactly=True)  # 9.4 us a page become 0.7, and no SIGBUS when full
            self.address = memory.map_memory(0, self.n_bytes, memory.SHARED, file.descriptor)
        except OSError as error:
            self.why_not_file = f"{place.folder}: {error.strerror}"
            return
        paging.no_read_ahead(self.address, self.n_bytes)
        self.backing, self._shared = "file", True
        self._files.append(file)
        self._of[:] = 1

    def resident_bytes(self, parts: Iterable[Part] | None = None) -> int:
        """Bytes in memory, of all or of `parts`, as the kernel counts them (0 where it doesn't let us)."""
        masks = [in_memory(self.address, run)[0] for run in inward(parts, self.n_bytes)]
        return sum(bytes_of(mask) for mask in masks if mask is not None)

    def dirty_bytes(self, parts: Iterable[Part] | None = None) -> int | None:
        """Bytes that would have to be written before they can go; None where that can't be told."""
        with self._lock:
            found = [self._dirty(*run) for run in inward(parts, self.n_bytes)]
        return None if None in found else sum(filter(None, found))

    @property
    def stored_bytes(self) -> int:
        """Space that it holds on the disk."""
        return sum(file.reserved_bytes for file in list(self._files))

    def _dirty(self, start: int, stop: int) -> int | None:
        return dirty_bytes(self.address, (start, stop), self._files[0] if self._shared else None)

    def park(self, parts: Iterable[Part], deadline_s: float = math.inf) -> Done:
        """Have the bytes of `parts` leave memory. They read as before, from the disk."""
        return self._give_up(parts, deadline_s, stay=False)

    def write_behind(self, parts: Iterable[Part], deadline_s: float = math.inf) -> Done:
        """Begin to write what is dirty in `parts`; it stays in memory, and can be dropped without writing."""
        return self._give_up(parts, deadline_s, stay=True)

    def _give_up(self, parts: Iterable[Part], deadline_s: float, *, stay: bool) -> Done:
        until, written, why, finished = time.monotonic() + deadline_s, 0, "", True
        with self._lock:
            runs = list(inward(parts, self.n_bytes))
            if why := self._why_not_park():
                return Done(problem=why, finished=not runs)
            # What stays is not counted: a page that the kernel is just moving looks as if it had gone.
            counted = [] if stay else runs
            before = [in_memory(self.address, run)[0] for run in counted]
            for batch in batches(runs, _SYNC_BYTES if self._shared else SLICE_BYTES):
                if time.monotonic() > until:
                    finished = False
                    break
                try:
                    written += (self._park_shared if self._shared else self._park_private)(batch, stay)
                except OSError as error:
                    if self._shared and error.errno == errno.EIO:
                        # The kernel now takes the lost pages for clean: nothing may be dropped any more.
                        self._failed = "its disk failed, so that nothing is parked on it any more"
                    why, finished = f"it can't be parked: {error.strerror}", False
                    break
            if finished and not stay:
                paging.drop_stragglers(self.address, runs, self._of, self._drop)
            self.pieces = 1 if self._shared else 1 + int(np.count_nonzero(np.diff(self._of)))
            gone, how = went(self.address, counted, before)
        return Done(bytes_returned=gone, written_bytes=written, finished=finished, problem=why, counted=how)

    def _why_not_park(self) -> str:
        if self._closed:
            return "it is closed"
        others = () if self._shared else forks.members()
        if sum(it.pieces for it in others if isinstance(it, Mapping)) > MOST_PIECES:
            return "what is parked lies in too many pieces already"
        return self._failed or ("" if self._place else NO_PLACE)

    def _park_shared(self, batch: Sequence[Part], stay: bool) -> int:
        written = 0
        for start, stop in batch:  # all is on its way before the first is waited for
            dirty = self._dirty(start, stop)
            written += stop - start if dirty is None else dirty
            memory.write_back(self._files[0].descriptor, start, stop - start, wait=False)
        for part in () if stay else batch:
            self._drop(*part)
        return written

    def _park_private(self, batch: Sequence[Part], stay: bool) -> int:
        """Pages of our own go to the file and are mapped from it; pages never touched stay what they are."""
        written = 0
        for start, stop in batch:
            table = memory.page_table(self.address + start, stop - start)
            own = table[1] if table else np.ones((stop - start) // PAGE_BYTES, dtype=np.bool_)
            for part in runs_of(own, start):
                index, file = self._open_file()
                file.reserve(*part)
                file.write(part[0], memoryview(self.buffer).cast("B")[slice(*part)], cached=stay)
                self._map_from(index, *part)
            if not stay:
                self._drop(start, stop)
            written += bytes_of(own)
        return written

    def _drop(self, start: int, stop: int) -> None:
        """Have pages of files leave memory. Of those born in memory none may be its own any more."""
        for part, file in self._of_files(start, stop):
            paging.drop(self.address, file, part)

    def _of_files(self, start: int, stop: int) -> list[tuple[Part, ParkedFile]]:
        """The parts of this one that are mapped from files, each with its file."""
        if self._shared:  # all of it; with the looks page by page an idle cache took a fifth longer to go
            return [((start, stop), self._files[0])]
        of = self._of[start // PAGE_BYTES : stop // PAGE_BYTES]
        files = enumerate(self._files, start=1)
        return [(part, file) for index, file in files for part in runs_of(of == index, start)]

    def _open_file(self) -> tuple[int, ParkedFile]:
        """The file that may be written to, with its number in `_of`."""
        if not self._files or self._files[-1].frozen:
            assert self._place is not None  # else nothing is parked at all
            if len(self._files) == 255:
                raise OSError(errno.EMFILE, "it was forked too often")
            self._files.append(ParkedFile(self._place, self.n_bytes))
        return len(self._files), self._files[-1]

    def _map_from(self, index: int, start: int, stop: int) -> None:
        """Put a private mapping of a file (0: fresh anonymous memory) in place of what is there."""
        address, n_bytes = self.address + start, stop - start
        if index:
            descriptor = self._files[index - 1].descriptor
            memory.map_memory(address, n_bytes, memory.PRIVATE | memory.FIXED, descriptor, start)
        else:
            memory.map_memory(address, n_bytes, memory.ANONYMOUS | memory.FIXED)
        self._of[start // PAGE_BYTES : stop // PAGE_BYTES] = index

    def unpark(
        self, parts: Iterable[Part], max_bytes: int | None = None, deadline_s: float = math.inf
    ) -> Done:
        """Read `parts` into memory, clean, so that the kernel can take them again; `max_bytes` at most."""
        until, back, how, whole = time.monotonic() + deadline_s, 0, "mincore", True
        most = self.n_bytes if max_bytes is None else max_bytes
        # Where all of it is to come, the disk need not stand still between two slices.
        limited = max_bytes is not None or until < math.inf
        with self._lock:
            for batch in batches(inward(parts, self.n_bytes), SLICE_BYTES if limited else self.n_bytes):
                wanted, n_bytes, whole, how = paging.missing(self.address, batch, self._of, most - back)
                if n_bytes and time.monotonic() > until:
                    return Done(bytes_back=back, finished=False, counted=how)
                coming = [found for part in wanted for found in self._of_files(*part)]
                try:
                    paging.read_in(self.address, coming, self.buffer)
                except OSError as error:
                    why = f"it can't be read: {error.strerror}"
                    return Done(bytes_back=back, finished=False, problem=why)
                back += n_bytes
                if not whole:
                    break
            return Done(bytes_back=back, finished=whole, counted=how)

    def expect(self, parts: Iterable[Part]) -> None:
        """`parts` are read soon: the disk begins with what of them is not in memory, and nobody waits."""
        with self._lock, contextlib.suppress(OSError):
            paging.ask_for(found for run in inward(parts, self.n_bytes) for found in self._of_files(*run))

    def release(self, parts: Iterable[Part]) -> Done:
        """The content of `parts` is no longer needed: it reads as zeros, or as before where that can't be."""
        with self._lock:
            runs = list(inward(parts, self.n_bytes))
            if self._closed:
                return Done(problem="it is closed")
            before = [in_memory(self.address, run)[0] for run in runs]
            for start, stop in runs:
                try:
                    self._release_run(start, stop)
                except OSError as error:
                    return Done(problem=f"it can't be released: {error.strerror}", finished=False)
            returned, how = went(self.address, runs, before)
        return Done(bytes_returned=returned, counted=how)

    def _release_run(self, start: int, stop: int) -> None:
        if self._shared:
            try:
                self._files[0].zero(start, stop)
            except OSError:  # a hole would be no longer allocated, and a full disk end in SIGBUS
                if not self._failed:
                    self._park_shared([(start, stop)], False)
            return
        of = self._of[start // PAGE_BYTES : stop // PAGE_BYTES].copy()
        for part in runs_of(of == 0, start):
            memory.advise(self.address + part[0], part[1] - part[0], memory.DONTNEED)
        for part in runs_of(of != 0, start):
            self._map_from(0, *part)
            if not self._files[-1].frozen:
                self._files[-1].punch(*part)

    def close(self) -> None:
        """Give everything back now: what still looks at the memory sees zeros. Safe to call twice."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._map_from(0, 0, self.n_bytes)
                self._shared = False
                for file in self._files:
                    file.close()

    def before_fork(self) -> None:
        """A shared mapping would show each process the other's later writes: both get private ones of the
        file, which nobody writes to from now on."""
        self._lock.acquire()
        for file in self._files:
            file.frozen = True
        if self._shared:
            try:
                self._map_from(1, 0, self.n_bytes)
                self._shared = False
            except OSError:  # strict overcommit: better no memory there in the child than a common one
                with contextlib.suppress(OSError):
                    memory.advise(self.address, self.n_bytes, memory.DONTFORK)

    def after_fork(self) -> None:
        """See Forked."""
        self._lock.release()
