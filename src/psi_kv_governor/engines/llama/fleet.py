"""All programs under one sidecar as one engine: each agent that connects is one more process with caches."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import socket
import struct
import threading
import time
from collections.abc import Callable
from itertools import groupby

import msgspec

from psi_kv_governor.cache import (
    CacheState,
    Capabilities,
    Capability,
    Description,
    Evidence,
    Kind,
    Plan,
    Recall,
    Recalled,
    Result,
    Snapshot,
)
from psi_kv_governor.engines.llama.client import VERSION, Client, Op
from psi_kv_governor.engines.llama.engine import LlamaEngine
from psi_kv_governor.engines.llama.transport import OtherVersionError, SocketTransport
from psi_kv_governor.errors import EngineError

_ID_BITS = 20
"""Bits of a cache's number within its process; the number of the process stands above them."""
_OWN_ID = (1 << _ID_BITS) - 1
_RETRY_S = 0.5


class _Member:
    def __init__(self, number: int, pid: int, transport: SocketTransport, engine: LlamaEngine) -> None:
        self.number, self.pid, self.transport, self.engine = number, pid, transport, engine


class Fleet:
    """An `Engine` over every agent that connects to the abstract socket `name`.

    `opened` and `closed` are called with the process id of each that comes and goes, in a thread of its own;
    `refused` once with that of each that can't be governed, and why.
    """

    def __init__(
        self,
        *,
        place: str,
        backing: str,
        why_backing: str = "",
        name: str = "",
        opened: Callable[[int], None] = lambda pid: None,
        closed: Callable[[int], None] = lambda pid: None,
        refused: Callable[[int, str], None] = lambda pid, why: None,
    ) -> None:
        self.name = name or f"psi-kv-{os.getpid()}-{secrets.token_hex(8)}"
        """Without the NUL that makes it abstract. Nobody can guess it; each end looks who the other is."""
        self._place, self._backing, self._why_backing = place, backing, why_backing
        self._opened, self._closed, self._refused = opened, closed, refused
        self._strangers: set[int] = set()
        self._members: dict[int, _Member] = {}
        self._next = 1
        self._kinds: frozenset[Kind] = frozenset()
        self._refuses = False
        self._recall = Recall()
        self._lock = threading.Lock()
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(f"\0{self.name}")
        self._listener.listen(64)
        self._thread = threading.Thread(target=self._accept, name="psi-kv-agents", daemon=True)
        self._thread.start()

    # -- coming and going -------------------------------------------------------------------------------

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError as error:
                if error.errno not in {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS}:
                    return  # closed
                time.sleep(_RETRY_S)  # whoever waits is served when a descriptor is free again
                continue
            threading.Thread(target=self._enter, args=(connection,), name="psi-kv-agent", daemon=True).start()

    def _enter(self, connection: socket.socket) -> None:
        credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        pid, uid, _ = struct.unpack("3i", credentials)
        transport = SocketTransport(connection)
        if uid != os.getuid() and os.getuid() != 0:
            transport.close()
            return
        client = Client(transport)
        try:
            told = client.ask(Op.HELLO)
            if len(told.payload) < 8 or struct.unpack_from("<2i", told.payload)[1] != VERSION:
                raise OtherVersionError
        except (EngineError, struct.error) as error:
            transport.close()
            if isinstance(error, OtherVersionError) and pid not in self._strangers:
                self._strangers.add(pid)  # it comes again and again, in case that we change
                self._refused(pid, f"{error}: start the program again")
            return
        engine = LlamaEngine(
            client, pid=pid, place=self._place, backing=self._backing, why_backing=self._why_backing
        )
        with self._lock:
            member = _Member(self._next, pid, transport, engine)
            self._next += 1
            self._members[member.number] = member
        asked = None
        # It may change meanwhile, and be asked before: what we ask then is the older.
        while (wanted := self._wanted()) != asked:
            with contextlib.suppress(EngineError):
                kinds, refuses, recall = wanted
                engine.collect(kinds)
                engine.refuse_blobs(refuses)
                engine.recall(recall)
            asked = wanted
        self._opened(pid)

    def _wanted(self) -> tuple[frozenset[Kind], bool, Recall]:
        """What is asked of all."""
        with self._lock:
            return self._kinds, self._refuses, self._recall

    def _gone(self, member: _Member) -> None:
        with self._lock:
            known = self._members.pop(member.number, None) is not None
        member.transport.close()
        if known:
            self._closed(member.pid)

    @property
    def pids(self) -> list[int]:
        """The processes that are connected now."""
        return [member.pid for member in self._all()]

    def _all(self) -> list[_Member]:
        with self._lock:
            return list(self._members.values())

    # -- the protocol -----------------------------------------------------------------------------------

    def describe(self) -> Description:
        """See Engine. Of several processes what any can do: the others say why not when they are asked."""
        told = []
        for member in self._all():
            with contextlib.suppress(EngineError):  # it ended: the next snapshot leaves it out
                told.append(member.engine.describe())
        if told:
            first = msgspec.structs.asdict(told[0].capabilities)
            for one in told[1:]:
                others = msgspec.structs.asdict(one.capabilities)
                first = {name: able if able.able else others[name] for name, able in first.items()}
            return msgspec.structs.replace(told[0], capabilities=Capabilities(**first))
        none_yet = Capability(able=False, why="no program with a llama.cpp cache has connected yet")
        return Description(
            engine="llama",
            capabilities=Capabilities(
                release=none_yet, park=none_yet, mask=none_yet, blobs=none_yet, evict=none_yet
            ),
            backing=self._backing,
            place=self._place,
            details={"backing": self._why_backing} if self._why_backing else {},
        )

    def snapshot(self) -> Snapshot:
        """See Engine. A process that ended is left out from then on."""
        caches: list[CacheState] = []
        written_bytes, time_s = 0, 0.0
        for member in self._all():
            try:
                one = member.engine.snapshot()
            except EngineError:
                self._gone(member)
                continue
            written_bytes += one.written_bytes
            time_s = max(time_s, one.time_s)
            for cache in one.caches:
                number = member.number << _ID_BITS | cache.id
                caches.append(msgspec.structs.replace(cache, id=number))
        return Snapshot(time_s=time_s, caches=tuple(caches), written_bytes=written_bytes)

    def apply(self, plan: Plan) -> Result:
        """See Engine. Steps of different processes are carried out in the order of the plan."""
        total = Result()
        for number, steps in groupby(plan.steps, lambda step: step.cache >> _ID_BITS):
            with self._lock:
                member = self._members.get(number)
            if member is None:
                continue  # it ended meanwhile
            left = (
                None if plan.max_bytes is None else plan.max_bytes - total.bytes_returned - total.bytes_back
            )
            if (left is not None and left <= 0) or total.seconds >= plan.deadline_s:
                return msgspec.structs.replace(total, done=False)
            one = Plan(
                steps=tuple(msgspec.structs.replace(step, cache=step.cache & _OWN_ID) for step in steps),
                deadline_s=plan.deadline_s - total.seconds,
                max_bytes=left,
                urgent=plan.urgent,
            )
            try:
                result = member.engine.apply(one)
            except EngineError:
                self._gone(member)
                continue
            total = total.plus(result)
        return total

    def collect(self, kinds: frozenset[Kind]) -> None:
        """See Engine. Also of those who connect later."""
        with self._lock:
            self._kinds = kinds
        for member in self._all():
            with contextlib.suppress(EngineError):
                member.engine.collect(kinds)

    def evidence(self, cache: int, sequence: int) -> Evidence:
        """See Engine."""
        with self._lock:
            member = self._members.get(cache >> _ID_BITS)
        if member is None:
            raise EngineError("the process of this cache has ended")
        return member.engine.evidence(cache & _OWN_ID, sequence)

    def recall(self, settings: Recall) -> None:
        """See LlamaEngine. Also of those who connect later."""
        with self._lock:
            self._recall = settings
        for member in self._all():
            with contextlib.suppress(EngineError):
                member.engine.recall(settings)

    def recalled(self) -> Recalled:
        """Return what was done in all processes together; why nothing can be is said where none can."""
        told = []
        for member in self._all():
            with contextlib.suppress(EngineError):
                told.append(member.engine.recalled())
        able = [one for one in told if not one.why_not]
        if not able:
            return next(iter(told), Recalled(why_not="no process is there"))
        totals = {
            name: sum(getattr(one, name) for one in able)
            for name in ("read_bytes", "blocks", "exchanges", "decoded_again")
        }
        return Recalled(**totals, summary_bytes=max(one.summary_bytes for one in able))

    def refuse_blobs(self, refuse: bool) -> None:
        """See LlamaEngine. Also of those who connect later."""
        with self._lock:
            self._refuses = refuse
        for member in self._all():
            with contextlib.suppress(EngineError):
                member.engine.refuse_blobs(refuse)

    def close(self) -> None:
        """See Engine."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for member in self._all():
            member.engine.close()
            member.transport.close()
