"""The sandbox: limits hold inside it, and it goes away whatever happens to its parent."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from psi_kv_governor.errors import BadInputError, PsiKvError
from psi_kv_governor.pressure.psi import PsiFile
from psi_kv_governor.sandbox import zram
from psi_kv_governor.sandbox.sandbox import LEAST_BYTES, Sandbox
from waiting import PATIENCE_S, until

MIB = 1 << 20

FILL = (
    "import os, sys\n"
    "taken = [os.urandom(1 << 20) for _ in range(int(sys.argv[1]))]\n"
    "print(len(taken), flush=True)\n"
    "sys.stdin.read()\n"
)

# Opens a sandbox with swap, starts a program in it, says what there is, and waits to be killed.
PARENT = """
import json, sys, time
from psi_kv_governor.sandbox.sandbox import Sandbox
sandbox = Sandbox(64 << 20, swap_bytes=64 << 20)
child = sandbox.popen(["sleep", "300"])
while child.pid not in sandbox.group.pids():
    time.sleep(0.01)
print(json.dumps({"folders": [str(f) for f in sandbox.group.folders], "child": child.pid,
                  "device": f"/dev/zram{sandbox._zram}", "guardian": sandbox._guardian.pid}), flush=True)
time.sleep(300)
"""


def swaps() -> str:
    return Path("/proc/swaps").read_text()


def interrupt(sandbox: Sandbox) -> None:
    with sandbox:
        raise KeyboardInterrupt


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):  # gone before it was opened, or before it was read
        return False


def gone(made: dict) -> bool:
    """Whether nothing is left of the sandbox that PARENT described."""
    return (
        not any(Path(folder).exists() for folder in made["folders"])
        and not Path("/sys/block", Path(made["device"]).name).exists()
        and made["device"] not in swaps()
        and not alive(made["child"])
        and not alive(made["guardian"])
    )


@pytest.fixture
def parent():
    """A process that has a sandbox, and what it says of it."""
    process = subprocess.Popen(
        [sys.executable, "-c", PARENT],
        stdout=subprocess.PIPE,
    )
    made = json.loads(process.stdout.readline())
    assert not gone(made)
    yield process, made
    process.kill()
    process.wait()
    process.stdout.close()
    until(lambda: gone(made), f"left behind: {made}")


class TestLimit:
    pytestmark = pytest.mark.cgroup

    def test_a_program_runs_inside_and_is_counted(self):
        with Sandbox(64 * MIB) as sandbox:
            child = sandbox.popen(
                [sys.executable, "-c", FILL, "20"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
            )
            assert child.stdout.readline() == b"20\n"
            assert sandbox.group.pids() == [child.pid]
            assert 20 * MIB < sandbox.group.usage_bytes() < 64 * MIB
            child.communicate()
            assert child.returncode == 0
            folders = sandbox.group.folders
        assert not any(folder.exists() for folder in folders)

    def test_more_than_the_limit_is_killed_and_counted(self):
        with Sandbox(64 * MIB) as sandbox:
            child = sandbox.popen([sys.executable, "-c", FILL, "100"], stdin=subprocess.DEVNULL)
            assert child.wait(PATIENCE_S) == -signal.SIGKILL
            assert sandbox.group.oom_kills() == 1

    def test_it_closes_on_programs_that_run_on(self):
        with Sandbox(64 * MIB) as sandbox:
            folders = sandbox.group.folders
            child = sandbox.popen(["sh", "-c", "trap '' TERM INT; sleep 300 & sleep 300"])
            until(lambda: len(sandbox.group.pids()) >= 2)
            pids = sandbox.group.pids()
        assert child.returncode == -signal.SIGKILL
        # Its cgroup is left by a killed process shortly before it is a zombie.
        until(lambda: not any(alive(pid) for pid in pids))
        assert not any(folder.exists() for folder in folders)
        sandbox.close()

    def test_an_exception_inside_is_passed_on_and_the_pen_removed(self):
        sandbox = Sandbox(64 * MIB)
        folders = sandbox.group.folders
        with pytest.raises(KeyboardInterrupt):
            interrupt(sandbox)
        assert not any(folder.exists() for folder in folders)

    def test_two_pens_are_apart(self):
        with Sandbox(64 * MIB) as one, Sandbox(64 * MIB) as two:
            child = one.popen(["sleep", "300"])
            until(lambda: one.group.pids() == [child.pid])
            assert two.group.pids() == []

    def test_a_guardian_that_was_killed_is_stood_in_for(self):
        with Sandbox(64 * MIB) as sandbox:
            folders = sandbox.group.folders
            sandbox._guardian.kill()
        assert not any(folder.exists() for folder in folders)

    def test_without_swap_it_may_not_use_that_of_the_machine(self):
        with Sandbox(64 * MIB) as sandbox:
            assert sandbox._zram is None
            limits = {"memory.memsw.limit_in_bytes": 64 * MIB, "memory.swap.max": 0, "memory.swappiness": 0}
            found = {
                name: sandbox.group.memory / name for name in limits if (sandbox.group.memory / name).exists()
            }
            assert {name: int(file.read_text()) for name, file in found.items()} == {
                name: limits[name] for name in found
            }


class TestSwap:
    pytestmark = pytest.mark.swap

    def test_more_than_the_limit_is_swapped_and_the_stall_counted(self):
        with Sandbox(48 * MIB, swap_bytes=96 * MIB) as sandbox:
            device = f"/dev/zram{sandbox._zram}"
            assert device in swaps()
            child = sandbox.popen(
                [sys.executable, "-c", FILL, "80"], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE
            )
            output, _ = child.communicate(timeout=PATIENCE_S)
            assert (child.returncode, output) == (0, b"80\n")
            assert sandbox.group.oom_kills() == 0
            if sandbox.pressure_file is not None and sandbox.pressure_file.exists():
                psi = PsiFile(sandbox.pressure_file)
                assert psi.read().some_us > 0
                psi.close()
        assert device not in swaps()
        assert not Path("/sys/block", Path(device).name).exists()

    def test_the_own_cgroup_is_discovered_inside(self):
        with Sandbox(96 * MIB, swap_bytes=64 * MIB) as sandbox:
            code = (
                "from psi_kv_governor.pressure import discover\n"
                "source = discover().source\n"
                "limits = [level.limit_bytes for level in source.read().levels if level.limit_bytes]\n"
                "print(source.name, min(limits))\n"
            )
            child = sandbox.popen(
                [sys.executable, "-c", code],
                stdout=subprocess.PIPE,
            )
            name, limit = child.communicate(timeout=PATIENCE_S)[0].decode().split()
            assert int(limit) == 96 * MIB
            if sandbox.pressure_file is not None and sandbox.pressure_file.exists():
                assert name == str(sandbox.pressure_file)

    def test_stall_inside_is_read_as_a_share(self):
        from psi_kv_governor.pressure.headroom import HeadroomReader
        from psi_kv_governor.pressure.machine import MachineSource

        with Sandbox(48 * MIB, swap_bytes=128 * MIB) as sandbox:
            if sandbox.pressure_file is None or not sandbox.pressure_file.exists():
                pytest.skip("this kernel keeps no PSI for cgroups: boot with psi=1")
            source = MachineSource(
                PsiFile(sandbox.pressure_file), HeadroomReader(sandbox.own_cgroups()), "sandbox"
            )
            calm = source.read()
            inside = next(level.name for level in calm.levels if level.limit_bytes == 48 * MIB)
            command = [
                sys.executable,
                "-m",
                "psi_kv_governor.sandbox.load",
                "--mib",
                "90",
                "--step-mib",
                "90",
            ]
            child = sandbox.popen(command, stdout=subprocess.PIPE)
            said = [json.loads(child.stdout.readline())["event"] for _ in range(2)]
            assert said == ["begin", "taken"]  # from now on it touches what is in swap, again and again
            source.read()
            time.sleep(1.0)
            pressed = source.read()
            level = next(level for level in pressed.levels if level.name == inside)
            assert 0.1 < pressed.some <= 1.0
            assert level.headroom_bytes < 16 * MIB
            source.close()
        child.stdout.close()

    @pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
    def test_a_killed_parent_leaves_nothing(self, parent, number):
        process, made = parent
        process.send_signal(number)
        assert process.wait(PATIENCE_S) == -number
        until(lambda: gone(made))

    def test_a_parent_killed_with_its_guardian_signalled_leaves_nothing(self, parent):
        """What a terminal or a service manager sends to everything; only SIGKILL would stop the guardian."""
        process, made = parent
        for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
            os.kill(made["guardian"], number)
        assert not gone(made)
        process.kill()
        until(lambda: gone(made))


def test_sizes_that_make_no_sense_are_refused():
    for options in (
        {"limit_bytes": LEAST_BYTES - 1},
        {"limit_bytes": -1},
        {"limit_bytes": 64 * MIB, "swap_bytes": LEAST_BYTES - 1},
        {"limit_bytes": 64 * MIB, "swap_bytes": -1},
    ):
        with pytest.raises(BadInputError, match="is not usable"):
            Sandbox(**options)


def test_a_pen_that_the_machine_could_not_fill_is_refused():
    with pytest.raises(PsiKvError, match="close other programs"):
        Sandbox(1 << 50)


def test_no_zram_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(zram, "CONTROL", tmp_path / "none")
    assert "modprobe zram" in zram.why_not()
