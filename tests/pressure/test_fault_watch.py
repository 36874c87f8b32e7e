"""Limits and clocks that change while it runs, and the service manager's word that can't be kept."""

from __future__ import annotations

import base64
import os
import socket
from pathlib import Path

import pytest
from sensing_help import OWN, WHOLE, Watched, is_ended, lasted_s, needs_psi, v2_group

from psi_kv_governor.pressure.cgroup import OwnCgroups
from psi_kv_governor.pressure.headroom import HeadroomReader
from psi_kv_governor.pressure.machine import MachineSource
from psi_kv_governor.pressure.psi import PsiFile
from psi_kv_governor.pressure.waking import find_waker
from psi_kv_governor.sandbox.cgroups import set_limit
from psi_kv_governor.sandbox.sandbox import Sandbox

# -- limits and clocks ---------------------------------------------------------------------------------------


@pytest.mark.cgroup
def test_a_limit_that_is_changed_while_running_counts_at_the_next_look():
    """With the kernel's own limit."""
    with Sandbox(300 << 20) as sandbox:
        reader = HeadroomReader(sandbox.own_cgroups())
        assert reader.levels()[0].limit_bytes == 300 << 20
        set_limit(sandbox.group, 100 << 20, 0)
        assert reader.levels()[0].limit_bytes == 100 << 20
    assert reader.read().source == "/proc/meminfo"  # and when the group is gone, the machine's
    reader.close()


@pytest.mark.parametrize("jump_s", [3600.0, -3600.0, 11.0], ids=["an hour on", "an hour back", "11 s on"])
def test_a_clock_jump_is_no_stall(v2, jump_s):
    clock = iter([5000.0, 5000.5, 5000.5 + jump_s, 5001.0 + jump_s])
    psi = PsiFile(v2.machine_psi(0))
    source = MachineSource(psi, HeadroomReader(OwnCgroups(None, None), v2.root), "test", lambda: next(clock))
    source.read()
    v2.machine_psi(50_000)
    assert source.read().some == pytest.approx(0.1)
    v2.machine_psi(10**12)
    jumped = source.read()
    assert (jumped.some, jumped.full, jumped.interval_s) == (0.0, 0.0, 0.0)
    v2.machine_psi(10**12 + 100_000)
    assert source.read().some == pytest.approx(0.2)  # and from there on it counts again
    source.close()


# -- the service manager's watch -----------------------------------------------------------------------------


def watch(path: object, first: bytes = b"") -> dict[str, str]:
    written = {"MEMORY_PRESSURE_WRITE": base64.b64encode(first).decode()} if first else {}
    return {"MEMORY_PRESSURE_WATCH": str(path), **written}


@pytest.mark.parametrize(
    ("environ", "why"),
    [
        pytest.param(watch("relative/path"), "no absolute path", id="relative"),
        pytest.param(watch("/nowhere/at/all"), "No such file", id="missing"),
        pytest.param(watch("/tmp/" + "x" * 300), "too long", id="too long a name"),
        pytest.param(watch("/"), "neither a PSI file", id="a folder"),
        pytest.param(watch("/dev/zero"), "neither a PSI file", id="a device"),
        pytest.param({**watch(WHOLE), "MEMORY_PRESSURE_WRITE": "&%"}, "not base64", id="no base64"),
        pytest.param({**watch(WHOLE), "MEMORY_PRESSURE_WRITE": "ä"}, "not base64", id="no ASCII"),
        pytest.param(watch(WHOLE, b"garbage\0"), "refuses the trigger", id="a bad trigger", marks=needs_psi),
    ],
)
def test_watch_garbage_is_passed_over(v2, monkeypatch, environ, why):
    waking = find_waker(v2.root, environ)
    assert why in waking.considered[0].why
    made = Watched(monkeypatch, v2.root, environ)
    assert made.sensor.read() is not None
    made.sensor.close()


def test_a_dead_fifo_never_blocks_and_never_wakes(v2, monkeypatch, tmp_path):
    """Nobody has it open, and nobody ever will."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    made = Watched(monkeypatch, v2.root, watch(fifo))
    assert made.sensor.sleeper.waker.name == f"FIFO {fifo}"
    assert lasted_s(lambda: made.sensor.wait(0.1)) >= 0.1
    fifo.unlink()
    assert lasted_s(lambda: made.sensor.wait(0.1)) >= 0.1
    assert made.sensor.read().source == str(v2.root / OWN)
    made.sensor.close()


def test_a_socket_that_is_closed_is_left_and_polling_goes_on(v2, monkeypatch, tmp_path):
    path = tmp_path / "socket"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        server.listen()
        made = Watched(monkeypatch, v2.root, watch(path, b"hello"))
        peer, _ = server.accept()
        assert peer.recv(100) == b"hello"
        peer.send(b"x")
        assert is_ended(made.sensor.wait)
        assert made.sensor.sleeper.lost == ""
        peer.close()
        assert is_ended(made.sensor.wait)
    assert made.sensor.read().source == str(v2.root / OWN)
    (source, why), *more = made.changes()
    assert (source, more) == (str(v2.root / OWN), [])
    assert "closed at its other end: it is only polled now" in why
    assert lasted_s(lambda: made.sensor.wait(0.1)) >= 0.1
    made.sensor.close()


def test_a_socket_that_nobody_listens_to_is_passed_over(v2, tmp_path):
    path = tmp_path / "socket"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
    waking = find_waker(v2.root, watch(path))
    assert waking.waker is None
    assert "refused" in waking.considered[0].why


def test_dev_null_turns_it_off(v2, monkeypatch):
    made = Watched(monkeypatch, v2.root, watch("/dev/null"))
    assert made.sensor.read() is None
    assert made.sensor.name == "none"
    assert made.sensor.sleeper.waker is None
    assert lasted_s(lambda: made.sensor.wait(0.05)) >= 0.05
    made.sensor.close()


@needs_psi
def test_the_kernel_s_file_by_the_service_manager_s_word(monkeypatch):
    """The usual case: its own file, its own trigger."""
    with v2_group("service") as folder:
        path = folder / "memory.pressure"
        made = Watched(monkeypatch, Path("/"), watch(path, b"some 150000 2000000\0"))
        assert made.sensor.name == str(path)
        assert made.sensor.sleeper.waker.name == f"trigger on {path}"
        assert made.sensor.read() is not None
        made.sensor.close()
