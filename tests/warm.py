"""A process that has imported what many short ones need, and becomes each of them in a forked child.

What a Python pays for its imports, half a second of processor time, is paid once. The child is a process of
its own in all else: environment, folder, output, exit status, and a seccomp filter where one is asked for. It
ends as every Python does.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from psikv_bench.survival import filtered

COMMANDS = (
    *(
        f"psi_kv_governor.cli.{name}"
        for name in ("doctor", "exec", "policies", "record", "replay", "simulate")
    ),
    *(
        f"psi_kv_governor.cli.{name}"
        for name in ("status", "tune", "watch", "limit", "park", "unpark", "run")
    ),
    "psi_kv_governor.service.exec",
)
"""What `psi-kv` imports for these commands."""
PSI_KV = "import sys\nfrom psi_kv_governor.cli import main\nmain(prog_name='psi-kv')"


class Warm:
    """The process. Ends with the `with` block."""

    def __init__(self, *modules: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__, *modules], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
        )  # fmt: skip

    def __enter__(self) -> Warm:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()  # whose end of its input ends it

    def run(
        self,
        code: str,
        arguments: Sequence[str],
        folder: Path,
        *,
        cwd: Path,
        environ: Mapping[str, str],
        deny: Sequence[str] = (),
        how: filtered.How = "kill",
        timeout_s: float = 800,
    ) -> subprocess.CompletedProcess[str]:
        """Run `code` with these `arguments`; what it says is written to two files in `folder`."""
        known = filtered.numbers() if deny else {}
        said = [folder / name for name in ("stdout", "stderr")]
        order = {
            "code": code,
            "arguments": list(arguments),
            "said": list(map(str, said)),
            "cwd": str(cwd),
            "environ": dict(environ),
            "deny": sorted(known[name] for name in deny if name in known),
            "how": how,
            "timeout_s": timeout_s,
        }
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps(order), file=self._process.stdin, flush=True)
        status = int(self._process.stdout.readline())
        out, err = (path.read_text() for path in said)
        return subprocess.CompletedProcess(list(arguments), status, out, err)


def _become(order: dict[str, Any]) -> None:
    """The child: all that it has of its parent are the modules."""
    nowhere = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nowhere, 0)
    os.close(nowhere)
    for number, path in enumerate(order["said"], 1):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        os.dup2(file, number)
        os.close(file)
    os.chdir(order["cwd"])
    os.environ.clear()
    os.environ.update(order["environ"])
    sys.argv = ["psi-kv", *order["arguments"]]
    if order["deny"]:
        filtered.install(order["deny"], (), order["how"])
    exec(compile(order["code"], "<test>", "exec"), {"__name__": "__main__"})


def main() -> None:
    """Entry point of the process."""
    for name in sys.argv[1:]:
        import_module(name)
    for line in sys.stdin:
        order = json.loads(line)
        child = os.fork()
        if child == 0:
            _become(order)
            return
        ended = os.pidfd_open(child)
        if not select.select([ended], [], [], order["timeout_s"])[0]:
            os.kill(child, signal.SIGKILL)
        os.close(ended)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
