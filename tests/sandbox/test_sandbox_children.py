"""Processes that speak in lines: heard whole, ended for sure."""

from __future__ import annotations

import os
import signal
import sys
import time

import pytest

from psi_kv_governor.sandbox.children import Child
from waiting import PATIENCE_S


def start(code: str) -> Child:
    return Child([sys.executable, "-c", code])


def lines(child: Child) -> list[bytes]:
    """Everything until it has ended."""
    found: list[bytes] = []
    while not child.ended:
        found += child.hear(PATIENCE_S)
    return found


def test_lines_are_heard_whole_however_they_are_cut():
    code = (
        "import os, time\n"
        "for part in (b'on', b'e\\ntw', b'o\\n', b'three\\nrest'):\n"
        "    os.write(1, part); time.sleep(0.02)\n"
    )
    with start(code) as child:
        assert lines(child) == [b"one", b"two", b"three"]
        assert child.wait() == 0


def test_what_is_heard_is_what_is_made_of_a_line():
    with Child([sys.executable, "-c", "print(1, 2, sep='\\n')"], decode=int) as child:
        assert lines(child) == [1, 2]
        assert child.hear(0.0) == []


def test_a_child_hears_what_it_is_told():
    with start("print(input().upper())") as child:
        child.send(b"go")
        assert lines(child) == [b"GO"]
        child.wait()
        child.send(b"nobody listens any more")


def test_the_last_line_of_its_complaint_is_kept():
    child = start("raise SystemExit('first\\nlast')")
    assert child.wait() == 1
    assert child.complaint() == "last"
    child.end()
    child.end()


def test_a_child_that_ignores_sigterm_is_killed(monkeypatch):
    monkeypatch.setattr("psi_kv_governor.sandbox.children._END_TIMEOUT_S", 0.2)
    code = "import signal, time\nsignal.signal(15, signal.SIG_IGN)\nprint(1, flush=True)\ntime.sleep(300)"
    child = start(code)
    assert child.hear(PATIENCE_S) == [b"1"]
    child.end()
    assert child.wait() == -9


def test_leaving_ends_it():
    with pytest.raises(KeyboardInterrupt), start("import time; time.sleep(300)") as child:
        raise KeyboardInterrupt
    assert child.status() == -15


def test_the_last_lines_of_a_child_that_is_ended_are_not_lost(monkeypatch):
    # However long a busy machine takes to let it say them, and us hear them.
    monkeypatch.setattr("psi_kv_governor.sandbox.children._END_TIMEOUT_S", PATIENCE_S)
    monkeypatch.setattr("psi_kv_governor.sandbox.children._LAST_LINES_S", PATIENCE_S)
    code = (
        "import signal, sys, time\n"
        "signal.signal(15, lambda *_: sys.exit(print('last', flush=True)))\n"
        "print('first', flush=True)\ntime.sleep(300)"
    )
    with start(code) as child:
        assert child.hear(PATIENCE_S) == [b"first"]
    assert child.hear(0.0) == [b"last"]
    assert child.ended


def test_ending_a_child_does_not_wait_for_who_else_holds_its_pipe():
    code = (
        "import subprocess, sys\n"
        "print(subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']).pid, flush=True)\n"
    )
    child = start(code)
    assert child.wait() == 0
    began_s = time.monotonic()
    child.end()
    assert time.monotonic() - began_s < 30.0
    (line,) = child.hear(PATIENCE_S)
    os.kill(int(line), signal.SIGKILL)
