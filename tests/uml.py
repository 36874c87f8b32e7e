"""A whole small machine with a kernel of its own: User Mode Linux, on the files of this one, read only.

It has no PSI. `apt install user-mode-linux` has it; it boots in two seconds.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import psi_kv_governor

_INIT = """\
#!/bin/sh
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t tmpfs tmp /mnt
mount -t tmpfs run /run
mount -t cgroup2 cgroup2 /sys/fs/cgroup
export PYTHONPATH={sources} PYTHONDONTWRITEBYTECODE=1 HOME=/mnt
{python} {script} > /mnt/out 2>&1
echo "<<<"; cat /mnt/out; echo ">>>"
echo o > /proc/sysrq-trigger
sleep 5
"""


def why_not() -> str:
    """Why there is none here; empty where there is one."""
    return (
        "" if shutil.which("linux.uml") else "User Mode Linux is not installed: apt install user-mode-linux"
    )


def run(script: str, folder: Path, *, memory_mib: int = 400, options: tuple[str, ...] = ()) -> Any:
    """The JSON that `script` (Python) prints on a machine of so much memory with this package."""
    from psikv_bench.survival import whole  # not in each environment in which conftest.py is read

    (folder / "script.py").write_text(script)
    sources = Path(psi_kv_governor.__file__).parents[1]
    init = folder / "init.sh"
    init.write_text(_INIT.format(sources=sources, python=sys.executable, script=folder / "script.py"))
    init.chmod(0o755)
    command = ["linux.uml", f"mem={memory_mib}M", "rootfstype=hostfs", "root=/dev/root", "rootflags=/", "ro"]
    command += [f"init={init}", "con=null", "con0=fd:0,fd:1", "quiet", f"umid=psi-kv-{folder.name}", *options]
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        env={"HOME": str(folder), "PATH": "/usr/bin:/bin", "TMPDIR": str(folder)},
    ) as machine:
        try:
            printed, errors = machine.communicate(timeout=800)
        finally:
            whole.kill(machine)
    out = printed.partition("<<<")[2].partition(">>>")[0].strip()
    assert out.startswith("{"), printed[-3000:] + errors[-2000:]
    return json.loads(out)
