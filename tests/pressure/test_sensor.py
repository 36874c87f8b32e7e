"""What is read, what wakes the loop for it, and how the sensor goes down the ladder and up again."""

from __future__ import annotations

import socket
import sys
import threading
import time

import pytest
from sensing_help import LONG_S, Watched, is_ended, lasted_s, open_descriptors, stays_failed

from fakes import FakeSource
from psi_kv_governor import sensor as sensor_module
from psi_kv_governor.bus import Bus
from psi_kv_governor.events import Degraded
from psi_kv_governor.pressure.psi import PsiFile
from psi_kv_governor.pressure.sleeper import Sleeper
from psi_kv_governor.pressure.waker import arm
from psi_kv_governor.pressure.waking import Waking
from psi_kv_governor.sandbox.sandbox import Sandbox
from psi_kv_governor.sensor import Sensor

OWN, MACHINE = "sys/fs/cgroup/app/memory.pressure", "proc/pressure/memory"


@pytest.fixture
def v2(tree):
    tree.membership("0::/app")
    tree.mounts(("v2", "/", "/sys/fs/cgroup"))
    tree.v2("sys/fs/cgroup/app")
    tree.machine_psi()
    return tree


def test_a_source_that_was_given_is_read_alone_and_not_closed():
    source = FakeSource(stall=0.5)
    sensor = Sensor(source, Bus())
    assert sensor.read().some == 0.5
    assert sensor.name == source.name
    assert sensor.sleeper.waker is None  # nothing of the machine wakes the loop for it
    sensor.close()
    assert source.closed == 0


class Asked(FakeSource):
    asked = 0

    def read(self):
        self.asked += 1
        return super().read()


def test_a_source_that_was_given_and_lost_is_read_again_when_it_answers(v2, monkeypatch):
    now_s, source = [time.monotonic()], Asked(stall=0.5)
    monkeypatch.setattr(sensor_module.time, "monotonic", lambda: now_s[0])
    made = Watched(monkeypatch, v2.root, {}, source)
    source.lost = "it is away"
    assert made.sensor.read() is None
    for _ in range(240):  # an hour
        assert made.sensor.read().source == str(v2.root / OWN)
        now_s[0] += 15.0
    assert source.asked < 20
    source.lost = ""
    now_s[0] += 700.0
    assert made.sensor.read().some == 0.5
    assert made.changes() == [(str(v2.root / OWN), "it is away"), (source.name, "it answers again")]
    assert made.sensor.sleeper.waker is None
    made.sensor.close()
    assert source.closed == 0


def test_another_thread_interrupts_the_wait():
    sensor = Sensor(FakeSource(), Bus())
    timer = threading.Timer(0.05, sensor.interrupt)
    timer.start()
    assert is_ended(sensor.wait)
    timer.join()
    assert lasted_s(lambda: sensor.wait(0.05)) >= 0.05
    sensor.close()


LOAD = """
import mmap, sys
data = mmap.mmap(-1, 90 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
while True:
    for at in range(0, len(data), mmap.PAGESIZE):
        data[at] = 1
"""


@pytest.mark.swap
def test_a_trigger_of_the_kernel_ends_the_sleep_when_there_is_stall():
    with Sandbox(48 << 20, swap_bytes=128 << 20) as pen:
        if pen.pressure_file is None or not pen.pressure_file.exists():
            pytest.skip("this kernel keeps no PSI for cgroups: boot with psi=1")
        sleeper = Sleeper()
        sleeper.watch(arm(pen.pressure_file))
        assert lasted_s(lambda: sleeper.wait(0.1)) >= 0.1
        pen.popen([sys.executable, "-c", LOAD])
        assert is_ended(sleeper.wait)
        assert sleeper.lost == ""
        totals = PsiFile(pen.pressure_file)
        assert totals.read().some_us > 0
        totals.close()
        sleeper.close()


def test_a_failing_rung_is_left_alone_for_longer_each_time(v2, monkeypatch):
    """No flapping: the next rung is read meanwhile."""
    made = Watched(monkeypatch, v2.root, {})
    own = v2.root / OWN
    now_s = [time.monotonic()]
    monkeypatch.setattr(sensor_module.time, "monotonic", lambda: now_s[0])
    good, readings = own.read_bytes(), 0
    for _ in range(240):  # an hour in which it answers a search, and fails as soon as it is read
        own.write_text("" if made.sensor.name == str(own) else good.decode())
        made.later()
        readings += made.sensor.read() is not None
        now_s[0] += 15.0
    assert readings > 220
    assert 6 <= len(made.changes()) <= 24  # down and up again, after 10, 20, 40 ... 640 s
    made.sensor.close()


def test_searches_are_rare_while_nothing_can_be_better(v2, monkeypatch):
    made = Watched(monkeypatch, v2.root, {})
    looks = []
    monkeypatch.setattr(sensor_module, "find_waker", lambda **_: looks.append(1) or Waking(None, []))
    now_s = [time.monotonic()]
    monkeypatch.setattr(sensor_module.time, "monotonic", lambda: now_s[0])
    for _ in range(6000):
        made.sensor.read()
        now_s[0] += 0.1
    assert 15 <= len(looks) <= 21  # ten minutes, every half of one
    assert made.changes() == []
    made.sensor.close()


def test_a_waker_that_was_lost_is_armed_again_when_it_can_be_had_again(v2, monkeypatch, tmp_path):
    path = tmp_path / "socket"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        server.listen()
        stays_failed(monkeypatch)
        made = Watched(monkeypatch, v2.root, {"MEMORY_PRESSURE_WATCH": str(path)})
        server.accept()[0].close()
        made.sensor.wait(LONG_S)
        made.sensor.read()
        assert made.sensor.sleeper.waker is None
        made.later()
        made.sensor.read()
        assert made.sensor.sleeper.waker is None  # it failed just now
        made.sensor._backoff._until_s.clear()
        made.later()
        made.sensor.read()
        assert made.sensor.sleeper.waker.name == f"socket {path}"
        assert made.changes() == [
            (made.sensor.name, f"socket {path} was closed at its other end: it is only polled now")
        ]
        made.sensor.close()


def test_where_it_is_turned_off_it_says_so(v2, monkeypatch):
    told = []
    monkeypatch.setattr(Bus, "tell", lambda self, event: told.append(event))
    made = Watched(monkeypatch, v2.root, {"MEMORY_PRESSURE_WATCH": "/dev/null"})
    assert [(type(event), "turns memory pressure handling off" in event.why) for event in told] == [
        (Degraded, True)
    ]
    made.sensor.close()


def test_a_hundred_sensors_that_are_closed_or_dropped_leave_nothing_open(v2, monkeypatch):
    Watched(monkeypatch, v2.root, {}).sensor.close()
    before = open_descriptors()
    for number in range(100):
        made = Watched(monkeypatch, v2.root, {})
        made.sensor.read()
        made.sensor.wait(0.0)
        if number % 2:
            made.sensor.close()
    del made
    assert open_descriptors() <= before


def test_a_hundred_losses_leave_nothing_open(v2, monkeypatch):
    made = Watched(monkeypatch, v2.root, {})
    good = (v2.root / OWN).read_bytes()
    made.sensor.read()
    before = open_descriptors()
    for _ in range(100):
        (v2.root / OWN).write_text("")
        made.sensor.read()
        made.sensor.read()
        (v2.root / OWN).write_bytes(good)
        made.sensor._backoff._until_s.clear()
        made.later()
        assert made.sensor.read().source == str(v2.root / OWN)
    assert open_descriptors() <= before
    made.sensor.close()
