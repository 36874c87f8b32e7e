"""Between two turns of a calm machine the loop only glances at it, and is no later for that."""

from __future__ import annotations

import pytest

from psi_kv_governor.config import GovernorConfig
from psi_kv_governor.control import Mode
from psi_kv_governor.engines.simulated import SimulatedEngine
from psi_kv_governor.events import Trimmed
from psi_kv_governor.governor import Governor
from psi_kv_governor.pressure.cgroup import find_cgroups
from psi_kv_governor.pressure.headroom import HeadroomReader
from psi_kv_governor.pressure.machine import MachineSource
from psi_kv_governor.pressure.psi import PsiFile

GIB, MIB = 1 << 30, 1 << 20
BEGIN_S = 100.0


class Scene:
    """A cgroup with a limit on a fake machine, a governor that looks at it, and a clock moved by hand."""

    def __init__(self, tree, limit_bytes: int, *, glances: bool = True) -> None:
        self.tree, self.limit_bytes, self.now_s = tree, limit_bytes, BEGIN_S
        tree.machine_psi()
        tree.membership("0::/pod")
        tree.mounts(("v2", "/", "/sys/fs/cgroup"))
        self.is_now()
        rooms = HeadroomReader(find_cgroups(tree.root), tree.root, self.clock, environ={})
        psi = PsiFile(tree.root / "sys/fs/cgroup/pod/memory.pressure")
        pod = str(tree.root / "sys/fs/cgroup/pod")
        # Of no process: what this one holds moves by itself, and is part of what the law follows.
        self.source = MachineSource(psi, rooms, "scene", self.clock, level=pod, processes=tuple)
        self.readings = 0
        self._read = self.source.read
        self.source.read = self._counted
        if not glances:
            self.source.glance = lambda bounds: None
        engine = SimulatedEngine(clock=self.clock)
        engine.add_cache(4096)
        engine.decode(3000)
        self.governor = Governor(
            engine,
            source=self.source,
            clock=self.clock,
            jitter=0.5,
            config=GovernorConfig(status_socket=False),
        )
        self.trimmed_s: list[float] = []
        self.governor.subscribe(
            lambda event: isinstance(event, Trimmed) and self.trimmed_s.append(self.now_s)
        )

    def clock(self) -> float:
        return self.now_s

    def _counted(self):
        self.readings += 1
        self.reading = self._read()
        return self.reading

    def is_now(self, used_bytes: int = 100 * MIB, stall_us: int = 0, available_kb: int = 6_000_000) -> None:
        self.tree.v2(
            "sys/fs/cgroup/pod",
            some_us=stall_us,
            max=str(self.limit_bytes),
            high="max",
            current=str(used_bytes),
            stat="inactive_file 0",
        )
        self.tree.write("proc/meminfo", f"MemTotal: 8000000 kB\nMemAvailable: {available_kb} kB\n")

    def look(self) -> bool:
        """One turn of the loop and its pause; whether it took a reading."""
        before = self.readings
        self.now_s += self.governor.step()
        return self.readings > before

    def calm(self) -> None:
        """Until it only glances."""
        assert any(not self.look() for _ in range(100))

    def close(self) -> None:
        self.governor.close()
        self.source.close()


@pytest.fixture(params=[16 * GIB, GIB // 2], ids=["plenty", "a small pod"])
def scene(tree, request):
    made = Scene(tree, request.param)
    yield made
    made.close()


def test_of_a_calm_hour_there_is_a_reading_in_two_seconds(scene):
    scene.calm()
    before, began_s, looks = scene.readings, scene.now_s, 0
    while scene.now_s < began_s + 60.0:
        scene.look()
        looks += 1
    assert scene.readings - before <= 31
    assert looks >= 300  # and it looked as often as ever
    assert scene.governor.status().mode is Mode.CALM


@pytest.mark.parametrize(
    "news",
    [
        {"stall_us": 20_000},
        {"used_bytes": 490 * MIB},
        {"available_kb": 200_000},
    ],
    ids=["stall", "the cgroup fills", "the machine fills"],
)
def test_what_changes_is_read_in_the_look_that_sees_it(tree, news):
    scene = Scene(tree, GIB // 2)
    scene.calm()
    due_s = scene.now_s + 3.0 if "available_kb" in news else scene.now_s
    scene.is_now(**news)
    while not (read := scene.look()) and scene.now_s < due_s:
        pass  # the machine's 5 GB above its line need not be looked at before somebody could have taken half
    assert read
    scene.close()


def test_a_limit_that_is_lowered_counts_at_the_next_look(scene):
    scene.calm()
    scene.limit_bytes = 104 * MIB
    scene.is_now()
    assert scene.look()
    assert scene.reading.levels[0].limit_bytes == 104 * MIB


def test_stall_is_measured_since_the_last_glance_and_not_since_the_last_reading(scene):
    scene.calm()
    glanced_s = scene.now_s - scene.governor.step()
    scene.now_s = glanced_s + 0.2
    scene.is_now(stall_us=20_000)
    assert scene.look()
    assert scene.reading.some >= 0.09


@pytest.mark.parametrize("bytes_per_s", [40e6, 400e6, 2500e6])
@pytest.mark.parametrize("phase", [0.0, 0.31])
def test_a_fall_is_met_as_soon_as_by_readings_alone(tree, bytes_per_s, phase):
    met_s = {}
    for glances in (False, True):
        scene = Scene(tree, GIB // 2, glances=glances)
        scene.is_now(400 * MIB)
        while scene.now_s < BEGIN_S + 3.0:
            scene.look()
        falls_from_s = BEGIN_S + 3.0 + phase
        while not scene.trimmed_s:
            used = 400 * MIB + int(bytes_per_s * max(0.0, scene.now_s - falls_from_s))
            scene.is_now(min(used, GIB // 2))
            scene.look()
            assert scene.now_s < BEGIN_S + 30.0
        met_s[glances] = scene.trimmed_s[0]
        scene.close()
    assert met_s[True] <= met_s[False] + scene.governor.config.poll_busy_s


def test_a_limit_that_is_set_where_there_was_none_counts_within_a_second(scene):
    above = "sys/fs/cgroup"
    scene.calm()
    scene.tree.v2(above, some_us=None, max=str(104 * MIB), high="max", current=str(101 * MIB), stat="shmem 0")
    set_s = scene.now_s
    while not scene.look():
        assert scene.now_s <= set_s + 1.0
    assert any(level.limit_bytes == 104 * MIB for level in scene.reading.levels)
