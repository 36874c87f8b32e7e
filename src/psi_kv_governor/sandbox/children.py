"""Processes that speak in lines on standard output, several at a time."""

from __future__ import annotations

import contextlib
import subprocess
import tempfile
import threading
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from typing import IO

from psi_kv_governor.children import python_command
from psi_kv_governor.sandbox import load

Launch = Callable[..., "subprocess.Popen[bytes]"]
"""How a process is started: subprocess.Popen, or the same inside a sandbox."""
Heard = SimpleQueue[tuple["Child", bytes | None]]
"""What children say, line by line; None says that one has ended."""

_END_TIMEOUT_S = 10.0
"""A process that waits for its pages from swap answers SIGTERM late; after this it is killed."""
_LAST_LINES_S = 1.0
"""For what is still in the pipe of a process that has ended. A child of its own may hold it open."""


class Child:
    """A process that is listened to. Its standard error waits in a file until somebody asks.

    A context manager, which ends it.
    """

    def __init__(self, argv: Sequence[str], launch: Launch, heard: Heard) -> None:
        self._errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  # closed in `end`
        self._process = launch(
            argv,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            start_new_session=True,  # Ctrl-C in the terminal is for the parent, which then ends this one
        )
        self._listener = threading.Thread(target=self._listen, args=(heard,), daemon=True)
        self._listener.start()

    def _listen(self, heard: Heard) -> None:
        assert self._process.stdout is not None, "started with a pipe"
        with self._process.stdout as lines:
            for line in lines:
                if line.endswith(b"\n"):  # else it was killed while it wrote
                    heard.put((self, line[:-1]))
        heard.put((self, None))

    @property
    def pid(self) -> int:
        return self._process.pid

    def status(self) -> int | None:
        """Exit status, negative for a signal; None while it runs."""
        return self._process.poll()

    def wait(self) -> int:
        """Exit status, once it has ended."""
        return self._process.wait()

    def send(self, line: bytes) -> None:
        """Write a line to its standard input; nothing happens where the process no longer listens."""
        assert self._process.stdin is not None, "started with a pipe"
        with contextlib.suppress(BrokenPipeError):  # its end is seen, and judged, where its output is read
            self._process.stdin.write(line + b"\n")
            self._process.stdin.flush()

    def complaint(self) -> str:
        """Last line of its standard error."""
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else ""

    def end(self) -> None:
        """SIGTERM, or SIGKILL where that does not help; its last lines are heard. Safe to call twice."""
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(_END_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._listener.join(_LAST_LINES_S)
        self._errors.close()
        with contextlib.suppress(BrokenPipeError):  # what was still to be written to it
            assert self._process.stdin is not None, "started with a pipe"
            self._process.stdin.close()

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()


def neighbour(mib: int, step_mib: int, pause_s: float) -> list[str]:
    """The command of a process that takes memory in steps: see `load`."""
    argv = python_command(load.__name__, "--mib", str(mib))
    return [*argv, "--step-mib", str(step_mib), "--pause-s", str(pause_s)]
