"""A prompt cache is refused only under pressure, and only while its states can't be parked."""

from __future__ import annotations

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
from psi_kv_governor.governor import Governor

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
