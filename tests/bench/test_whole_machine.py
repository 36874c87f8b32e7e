"""A machine within a machine is ended whole."""

from __future__ import annotations

import subprocess
import sys

from psikv_bench.survival import whole

_LEADER = """
import os, subprocess, sys
os.setsid()
subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=sys.stdin)
print("made", flush=True)
sys.stdin.read()
"""


def test_a_machine_is_killed_with_the_processes_that_it_is_made_of():
    """As User Mode Linux's: its first process alone leaves others that hold its output open."""
    command = [sys.executable, "-c", _LEADER]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as machine:
        assert machine.stdout is not None
        assert machine.stdout.readline() == b"made\n"
        whole.kill(machine)
        assert machine.stdout.read() == b""
    whole.kill(machine)  # nothing is left, and nobody else is killed


def test_what_has_no_group_of_its_own_is_killed_alone():
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        whole.kill(child)
        assert child.wait() == -9
