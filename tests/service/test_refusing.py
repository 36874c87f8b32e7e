"""A prompt cache is refused only under pressure, and only while its states can't be parked."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading

import pytest

from fakes import FakeSource
from psi_kv_governor.cache import (
    BlobState,
    CacheState,
    Capabilities,
    Capability,
    Description,
    Plan,
    Result,
    Snapshot,
)
from psi_kv_governor.config import GovernorConfig
from psi_kv_governor.engines.llama.client import VERSION, Op
from psi_kv_governor.engines.llama.engine import LlamaEngine
from psi_kv_governor.engines.llama.fleet import Fleet
from psi_kv_governor.governor import Governor
from waiting import until

ABLE, UNABLE = Capability(able=True), Capability(able=False, why="no place")


class OneBlob:
    """A program with one saved state, on a disk that takes it or not."""

    def __init__(self, *, place: bool, space: bool) -> None:
        self.place, self.space = place, space
        self.parked = False
        self.refused: list[bool] = []
        self.time_s = 0.0

    def describe(self) -> Description:
        park = ABLE if self.place else UNABLE
        able = Capabilities(release=ABLE, park=park, mask=UNABLE, blobs=park)
        return Description(engine="llama", capabilities=able)

    def snapshot(self) -> Snapshot:
        self.time_s += 0.5
        blob = BlobState(id=1, n_bytes=50 << 20, parked=self.parked)
        cache = CacheState(
            id=1, name="saved states", pid=1, capacity_cells=0, cell_bytes=1, row_bytes=1,
            resident_bytes=0 if self.parked else blob.n_bytes, maskable=False, blobs=(blob,),
        )  # fmt: skip
        return Snapshot(time_s=self.time_s, caches=(cache,))

    def apply(self, plan: Plan) -> Result:
        self.parked = self.parked or (self.space and any(step.blob for step in plan.steps))
        return Result() if self.space else Result(problem="the disk is full")

    def collect(self, kinds) -> None: ...

    def evidence(self, cache, sequence): ...

    def close(self) -> None: ...

    def refuse_blobs(self, refuse: bool) -> None:
        self.refused.append(refuse)


@pytest.fixture
def play():
    """Turns of the loop under pressure and then in quiet; what the engine was told after each part."""

    def play_(engine: OneBlob) -> list[list[bool]]:
        source = FakeSource(stall=0.9, tick_s=0.5)
        governor = Governor(engine, source=source, config=GovernorConfig(cooldown_s=0.0, quiet_s=2.0))
        told = []
        for stall, turns in ((0.9, 20), (0.0, 60)):
            source.stall = stall
            for _ in range(turns):
                governor.step()
            told.append(list(engine.refused))
        governor.close()
        return told

    return play_


def test_without_a_place_new_states_are_refused_until_the_pressure_is_over(play):
    assert play(OneBlob(place=False, space=False)) == [[True], [True, False]]


def test_on_a_full_disk_new_states_are_refused_until_the_pressure_is_over(play):
    assert play(OneBlob(place=True, space=False)) == [[True], [True, False]]


def test_where_they_can_be_parked_nothing_is_refused(play):
    engine = OneBlob(place=True, space=True)
    assert play(engine) == [[], []]
    assert engine.parked


def test_an_engine_without_a_prompt_cache_is_never_asked(play):
    class Without(OneBlob):
        refuse_blobs = None  # type: ignore[assignment]

    engine = Without(place=False, space=False)
    assert play(engine) == [[], []]


class Agent:
    """One on paper, that agrees to everything."""

    def __init__(self, name: str) -> None:
        self.refuses: list[bool] = []
        self._connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._connection.connect(f"\0{name}")
        self._thread = threading.Thread(target=self._answer)
        self._thread.start()

    def _answer(self) -> None:
        with self._connection, self._connection.makefile("rb") as asked:
            while head := asked.read(4):
                request = asked.read(*struct.unpack("<I", head))
                _, op, _, _, flags = struct.unpack_from("<IIIiI", request)
                if op == Op.REFUSE:
                    self.refuses.append(bool(flags))
                payload = struct.pack("<2i", 0, VERSION) if op == Op.HELLO else b""
                reply = struct.pack("<iIQQQQdII", *[0] * 9) + payload
                self._connection.sendall(struct.pack("<I", len(reply)) + reply)

    def wait(self) -> None:
        self._thread.join()


def test_one_that_comes_just_as_refusing_begins_refuses_as_well(monkeypatch):
    opened: list[int] = []
    with contextlib.closing(Fleet(place="", backing="memory", opened=opened.append)) as fleet:
        refuse_blobs = LlamaEngine.refuse_blobs

        def overtaken(engine: LlamaEngine, refuse: bool) -> None:
            if not refuse:
                fleet.refuse_blobs(True)
            refuse_blobs(engine, refuse)

        monkeypatch.setattr(LlamaEngine, "refuse_blobs", overtaken)
        agent = Agent(fleet.name)
        until(lambda: opened, "it did not come in")
    agent.wait()
    assert agent.refuses[-1] is True
    assert False in agent.refuses
