"""Whole small machines with a kernel of their own (User Mode Linux), and what Debian has to put on them."""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from psi_kv_governor.errors import PsiKvError

MIB = 1 << 20
DISK_BYTES = 512 * MIB
KERNEL_BYTES = 14 * MIB
"""What such a machine takes beyond what both programs share of each other, found by trying."""

_INIT = """\
#!/bin/sh
stty -echo 2> /dev/null
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev 2> /dev/null
mount -t tmpfs -o size=8m run /run
mount -t ext4 -o discard /dev/ubda /mnt
mount -t cgroup2 cgroup2 /sys/fs/cgroup
chmod 1777 /mnt
{before}
{exports}
{command} 2>&1
echo "ended $?"
echo o > /proc/sysrq-trigger
sleep 5
"""


def why_not() -> str:
    """Why there is none here; empty where there is one."""
    return "" if shutil.which("linux.uml") else "User Mode Linux is missing: apt install user-mode-linux"


def command(
    argv: Sequence[str],
    folder: Path,
    *,
    memory_bytes: int,
    environ: Mapping[str, str],
    before: Sequence[str] = (),
) -> list[str]:
    """The command that runs `argv` on a machine of so much memory, with the files of this one, read only, and
    a disk of its own at /mnt. It speaks to the caller by its standard input and output, and prints `ended N`
    when `argv` has ended with status N."""
    if why := why_not():
        raise PsiKvError(why)
    image = folder / "machine.img"
    with image.open("wb") as file:
        file.truncate(DISK_BYTES)
    subprocess.run(["mkfs.ext4", "-q", "-F", "-m", "0", str(image)], check=True)
    init = folder / "init.sh"
    exports = "\n".join(f"export {name}={shlex.quote(value)}" for name, value in environ.items())
    text = _INIT.format(before="\n".join(before), exports=exports, command=shlex.join(argv))
    init.write_text(text)
    init.chmod(0o755)
    return [
        "env", f"TMPDIR={folder}", f"HOME={folder}",
        "linux.uml", f"mem={memory_bytes >> 20}M", "rootfstype=hostfs", "root=/dev/root", "rootflags=/", "ro",
        f"init={init}", "con=null", "con0=fd:0,fd:1", "quiet", f"umid={folder.name[:48]}", f"ubd0={image}",
    ]  # fmt: skip


def kill(child: subprocess.Popen[Any]) -> None:
    """End `child` at once. A machine is several processes in a group that it makes, and those that are left
    hold its output open, so that its reader would wait for ever. Nothing is done once it was waited for: its
    number may be another's by then."""
    if child.returncode is not None:
        return
    with contextlib.suppress(ProcessLookupError):
        if os.getpgid(child.pid) == child.pid:
            os.killpg(child.pid, signal.SIGKILL)
        else:
            child.kill()


def native_folder(folder: Path) -> str:
    """A folder with the agent compiled, as an image has it: these machines are too small for a compiler."""
    made = folder / "native"
    if made.exists():
        return str(made)
    made.mkdir()
    made.chmod(0o755)
    code = "from psi_kv_governor.engines.llama.loader import load; raise SystemExit(load().why or 0)"
    environ = {"PATH": "/usr/bin:/bin", "HOME": str(folder), "PSIKV_NATIVE_DIR": str(made)}
    subprocess.run([sys.executable, "-c", code], check=True, env=environ)
    return str(made)


def earlyoom(folder: Path) -> str:
    """Debian's earlyoom: the installed one, or its package unpacked in `folder`."""
    if found := shutil.which("earlyoom"):
        return found
    package = folder / "earlyoom"
    package.mkdir(exist_ok=True)
    try:
        subprocess.run(
            ["apt-get", "-q", "download", "earlyoom"],
            cwd=package,
            check=True,
            capture_output=True,
            timeout=60,
        )
        (deb,) = package.glob("*.deb")
        subprocess.run(["dpkg", "-x", str(deb), str(package)], check=True, capture_output=True)
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        raise PsiKvError(f"earlyoom is not here and can't be had: {error}") from error
    return str(package / "usr/bin/earlyoom")
