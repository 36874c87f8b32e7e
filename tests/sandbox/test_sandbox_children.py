"""Processes that speak in lines: heard whole, ended for sure."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from queue import SimpleQueue

import pytest

from psi_kv_governor.sandbox.children import Child, Heard

TIMEOUT_S = 60.0


def start(code: str, heard: Heard | None = None) -> Child:
    return Child([sys.executable, "-c", code], subprocess.Popen, SimpleQueue() if heard is None else heard)


def lines(heard: Heard) -> list[bytes]:
    """Everything until one has ended."""
    found: list[bytes] = []
    while (line := heard.get(timeout=TIMEOUT_S)[1]) is not None:
        found.append(line)
    return found


def test_lines_are_heard_whole_however_they_are_cut():
    code = (
        "import os, time\n"
        "for part in (b'on', b'e\\ntw', b'o\\n', b'three\\nrest'):\n"
        "    os.write(1, part); time.sleep(0.02)\n"
    )
    heard: Heard = SimpleQueue()
    with start(code, heard) as child:
        assert lines(heard) == [b"one", b"two", b"three"]
        assert child.wait() == 0


def test_a_child_hears_what_it_is_told():
    heard: Heard = SimpleQueue()
    with start("print(input().upper())", heard) as child:
        child.send(b"go")
        assert lines(heard) == [b"GO"]
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
    heard: Heard = SimpleQueue()
    code = "import signal, time\nsignal.signal(15, signal.SIG_IGN)\nprint(1, flush=True)\ntime.sleep(300)"
    child = start(code, heard)
    assert heard.get(timeout=TIMEOUT_S) == (child, b"1")
    child.end()
    assert child.wait() == -9


def test_leaving_ends_it():
    with pytest.raises(KeyboardInterrupt), start("import time; time.sleep(300)") as child:
        raise KeyboardInterrupt
    assert child.status() == -15


def test_the_last_lines_of_a_child_that_is_ended_are_not_lost():
    code = (
        "import signal, sys, time\n"
        "signal.signal(15, lambda *_: sys.exit(print('last', flush=True)))\n"
        "print('first', flush=True)\ntime.sleep(300)"
    )
    heard: Heard = SimpleQueue()
    with start(code, heard) as child:
        assert heard.get(timeout=TIMEOUT_S) == (child, b"first")
    assert heard.get_nowait() == (child, b"last")
    assert heard.get_nowait() == (child, None)


def test_ending_a_child_does_not_wait_for_who_else_holds_its_pipe():
    code = (
        "import subprocess, sys\n"
        "print(subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']).pid, flush=True)\n"
    )
    heard: Heard = SimpleQueue()
    child = start(code, heard)
    assert child.wait() == 0
    began_s = time.monotonic()
    child.end()
    assert time.monotonic() - began_s < 30.0
    line = heard.get(timeout=TIMEOUT_S)[1]
    assert line is not None
    os.kill(int(line), signal.SIGKILL)
