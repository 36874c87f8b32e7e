"""Becomes another program under a seccomp filter, which refuses or kills for some system calls.

`python -m psikv_bench.survival.filtered '{"deny": ["mincore"], "how": "kill"}' PROGRAM [ARGS]`. Linux,
seccomp(2) and <linux/filter.h>; a filter is inherited by all that the program starts.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import json
import os
import re
import struct
import subprocess
import sys
from collections.abc import Sequence
from typing import Literal

How = Literal["kill", "refuse"]
"""By SIGSYS, as systemd's SystemCallFilter= does without SystemCallErrorNumber=; or with EPERM."""

_LOAD_NUMBER, _JUMP_EQUAL, _RETURN = 0x20, 0x15, 0x06  # BPF_LD|W|ABS, BPF_JMP|JEQ|K, BPF_RET|K
_ALLOW, _KILL, _REFUSE = 0x7FFF0000, 0x80000000, 0x00050000 | errno.EPERM  # SECCOMP_RET_*
_NO_NEW_PRIVILEGES, _SET_SECCOMP, _FILTER = 38, 22, 2  # PR_*, <sys/prctl.h>
_DEFINED = re.compile(r"^#define __NR_(\w+) (\d+)$", re.MULTILINE)


@functools.cache
def numbers() -> dict[str, int]:
    """System calls of this machine by name, as the C library's headers have them. Raises OSError without a
    compiler."""
    listed = subprocess.run(
        ["cc", "-E", "-dM", "-include", "sys/syscall.h", "-x", "c", os.devnull],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    return {name: int(number) for name, number in _DEFINED.findall(listed.stdout)}


def command(
    argv: Sequence[str],
    *,
    deny: Sequence[str] = (),
    allow: Sequence[str] = (),
    how: How = "kill",
) -> list[str]:
    """`argv` under a filter: all but `deny` is allowed, or with `allow` nothing else. Names that this
    machine has not are left out."""
    known = numbers()
    order = {
        "deny": sorted(known[name] for name in deny if name in known),
        "allow": sorted(known[name] for name in allow if name in known),
        "how": how,
    }
    return [sys.executable, "-I", __file__, json.dumps(order), *argv]


def install(deny: Sequence[int], allow: Sequence[int], how: How) -> None:
    """Set the filter for this process and what it starts, for good. Raises OSError."""
    refused = _KILL if how == "kill" else _REFUSE
    listed, answer, rest = (allow, _ALLOW, refused) if allow else (deny, refused, _ALLOW)
    steps = [(_LOAD_NUMBER, 0, 0, 0)]
    for number in listed:
        steps += [(_JUMP_EQUAL, 0, 1, number), (_RETURN, 0, 0, answer)]
    steps.append((_RETURN, 0, 0, rest))
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))
    program = struct.pack("HxxxxxxQ", len(steps), ctypes.addressof(code))
    libc = ctypes.CDLL(None, use_errno=True)
    for arguments in ((_NO_NEW_PRIVILEGES, 1, 0, 0, 0), (_SET_SECCOMP, _FILTER, program, 0, 0)):
        if libc.prctl(*arguments) != 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def main() -> None:
    """Entry point of the process that becomes the program."""
    order = json.loads(sys.argv[1])
    os.environ["PATH"] = os.environ.get("PATH", os.defpath)
    install(order["deny"], order["allow"], order["how"])
    os.execvp(sys.argv[2], sys.argv[2:])


if __name__ == "__main__":
    main()
