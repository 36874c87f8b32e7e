"""Everything that can go wrong with a trigger, with the kernel's own files wherever that can be."""

from __future__ import annotations

import errno
import os
import select
from pathlib import Path

import pytest
from sensing_help import (
    MACHINE,
    OWN,
    WHOLE,
    Watched,
    is_ended,
    lasted_s,
    needs_psi,
    open_descriptors,
    refuse,
    v2_group,
)

from psi_kv_governor.errors import BadInputError, SourceLostError
from psi_kv_governor.pressure import waker as waker_module
from psi_kv_governor.pressure import waking as waking_module
from psi_kv_governor.pressure.waker import PLAIN_TRIGGER, QUICK_TRIGGER, PsiTrigger, arm
from psi_kv_governor.pressure.waking import find_waker
from waiting import PATIENCE_S

# -- the trigger ---------------------------------------------------------------------------------------------


@needs_psi
@pytest.mark.parametrize(
    "spec",
    [
        pytest.param(b"junk\0", id="EINVAL: no trigger"),
        pytest.param(b"some 0 2000000\0", id="EINVAL: no threshold"),
        pytest.param(b"some 3000000 2000000\0", id="EINVAL: more than the window"),
        pytest.param(b"some 100000 20000000\0", id="EINVAL: too long a window"),
        pytest.param(b"", id="EINVAL: empty"),
    ],
)
def test_the_kernel_refuses_a_bad_trigger_and_no_descriptor_is_left(spec):
    before = open_descriptors()
    with pytest.raises(OSError, match="Invalid argument"):
        PsiTrigger(WHOLE, spec)
    assert open_descriptors() == before


@needs_psi
def test_a_short_window_that_is_refused_becomes_a_long_one(monkeypatch):
    """EINVAL without CAP_SYS_RESOURCE; with it the quick trigger is had at once."""
    tried = []

    def spy(path: Path, spec: bytes) -> PsiTrigger:
        tried.append(spec)
        return PsiTrigger(path, spec)

    monkeypatch.setattr(waker_module, "PsiTrigger", spy)
    trigger = arm(WHOLE)
    assert not select_once(trigger, 0) & select.POLLERR
    trigger.close()
    assert tried in ([QUICK_TRIGGER], [QUICK_TRIGGER, PLAIN_TRIGGER])


@needs_psi
def test_ebusy_leaves_the_trigger_armed():
    trigger = arm(WHOLE)
    with pytest.raises(OSError, match="busy"):
        os.write(trigger.fileno(), PLAIN_TRIGGER)
    assert not select_once(trigger, 0) & select.POLLERR
    trigger.close()


def select_once(trigger: PsiTrigger, timeout_ms: int) -> int:
    poll = select.poll()
    poll.register(trigger.fileno(), trigger.mask)
    return dict(poll.poll(timeout_ms)).get(trigger.fileno(), 0)


@pytest.mark.parametrize(
    "number", [errno.EINVAL, errno.EBUSY, errno.EPERM, errno.EACCES], ids=errno.errorcode.get
)
def test_a_trigger_that_is_refused_leaves_polling(v2, monkeypatch, number):
    refuse(monkeypatch, waking_module, number)
    made = Watched(monkeypatch, v2.root, {})
    assert made.sensor.sleeper.waker is None
    assert made.sensor.read().source == str(v2.root / OWN)
    assert 0.05 <= lasted_s(lambda: made.sensor.wait(0.05)) < PATIENCE_S
    refused = find_waker(v2.root, {}).considered[1:]
    assert all(not candidate.usable and candidate.why for candidate in refused)
    made.sensor.close()


def test_a_trigger_is_never_written_into_somebody_s_file(v2, tmp_path):
    """A file that only looks like PSI stays as it is."""
    for path in (v2.root / OWN, v2.root / MACHINE):
        before = path.read_bytes()
        with pytest.raises(BadInputError, match="no file of the kernel"):
            arm(path)
        assert path.read_bytes() == before
    (tmp_path / "empty").touch()
    with pytest.raises(BadInputError, match="PSI"):
        arm(tmp_path / "empty")


def test_a_false_first_event_costs_one_reading_and_says_nothing(v2, monkeypatch, tmp_path):
    """A trigger wakes; the counters decide."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    made = Watched(monkeypatch, v2.root, {"MEMORY_PRESSURE_WATCH": str(fifo)})
    made.sensor.read()
    writing = os.open(fifo, os.O_RDWR | os.O_NONBLOCK)
    os.write(writing, b"x")
    assert is_ended(made.sensor.wait)
    reading = made.sensor.read()
    assert (reading.some, reading.full) == (0.0, 0.0)
    assert lasted_s(lambda: made.sensor.wait(0.3)) >= 0.3
    os.close(writing)
    made.sensor.close()


@needs_psi
def test_pollerr_wakes_once_and_never_spins():
    with v2_group("pollerr") as folder:
        trigger = arm(folder / "memory.pressure")
        folder.rmdir()
        for _ in range(3):
            with pytest.raises(SourceLostError, match="cgroup is gone"):
                trigger.answer(select_once(trigger, 1000))
        trigger.close()
