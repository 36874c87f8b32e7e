"""Processes that speak in lines: heard whole, ended for sure."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from psi_kv_governor.sandbox.children import Child, Children


def start(code: str) -> Child:
    return Child([sys.executable, "-c", code], subprocess.Popen)


def heard(children: Children, timeout_s: float = 10.0) -> list[bytes | None]:
    """Everything until all have ended."""
    found: list[bytes | None] = []
    deadline_s = time.monotonic() + timeout_s
    while None not in found and time.monotonic() < deadline_s:
        found += [line for _, line in children.hear(0.1)]
    return found


def test_lines_are_heard_whole_however_they_are_cut():
    code = (
        "import os, time\n"
        "for part in (b'on', b'e\\ntw', b'o\\n', b'three\\nrest'):\n"
        "    os.write(1, part); time.sleep(0.02)\n"
    )
    with Children(subprocess.Popen) as children:
        child = children.start([sys.executable, "-c", code])
        assert heard(children) == [b"one", b"two", b"three", None]
        assert child.wait() == 0


def test_a_child_hears_what_it_is_told():
    with Children(subprocess.Popen) as children:
        child = children.start([sys.executable, "-c", "print(input().upper())"])
        child.send(b"go")
        assert heard(children) == [b"GO", None]
        child.send(b"nobody listens any more")


def test_the_last_line_of_its_complaint_is_kept():
    child = start("raise SystemExit('first\\nlast')")
    assert child.wait() == 1
    assert child.complaint() == "last"
    child.end()
    child.end()


def test_a_child_that_ignores_sigterm_is_killed(monkeypatch):
    monkeypatch.setattr("psi_kv_governor.sandbox.children._END_TIMEOUT_S", 0.2)
    child = start(
        "import signal, time\nsignal.signal(15, signal.SIG_IGN)\nprint(1, flush=True)\ntime.sleep(300)"
    )
    lines: list[bytes] = []
    while not lines:  # a line may come in two parts
        said = child.read()
        assert said is not None, "it ended"
        lines += said
    assert lines == [b"1"]
    child.end()
    assert child.wait() == -9


def test_leaving_ends_those_that_are_left():
    def leave() -> None:
        with Children(subprocess.Popen) as children:
            started.append(children.start([sys.executable, "-c", "import time; time.sleep(300)"]))
            raise KeyboardInterrupt

    started: list[Child] = []
    with pytest.raises(KeyboardInterrupt):
        leave()
    assert started[0].status() == -15


def test_ending_one_leaves_the_other_heard():
    with Children(subprocess.Popen) as children:
        silent = children.start([sys.executable, "-c", "import time; time.sleep(300)"])
        children.start([sys.executable, "-c", "print('here')"])
        children.end(silent)
        children.end(silent)
        assert heard(children) == [b"here", None]


def test_the_last_lines_of_a_child_that_is_ended_are_not_lost():
    code = (
        "import signal, sys, time\n"
        "signal.signal(15, lambda *_: sys.exit(print('last', flush=True)))\n"
        "print('first', flush=True)\ntime.sleep(300)"
    )
    with Children(subprocess.Popen) as children:
        child = children.start([sys.executable, "-c", code])
        said: list[bytes | None] = []
        while not said:  # a line may come in two parts
            said += [line for _, line in children.hear(10.0)]
        assert said == [b"first"]
        assert children.end(child) == [b"last"]
        assert children.end(child) == []


def test_ending_a_child_does_not_wait_for_who_else_holds_its_pipe():
    code = (
        "import subprocess, sys\n"
        "print(subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(20)']).pid, flush=True)\n"
    )
    child = start(code)
    assert child.wait() == 0
    began_s = time.monotonic()
    (line,) = child.end()
    assert time.monotonic() - began_s < 5.0
    os.kill(int(line), signal.SIGKILL)
