"""Processes that speak in lines on standard output."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import tempfile
import threading
from collections.abc import Callable, Sequence
from queue import Empty, SimpleQueue
from typing import IO, Any

from psi_kv_governor.children import python_command, reason
from psi_kv_governor.errors import BadInputError, PsiKvError
from psi_kv_governor.sandbox import load

_END_TIMEOUT_S = 10.0
"""A process that waits for its pages from swap answers SIGTERM late; after this it is killed."""
_LAST_LINES_S = 1.0
"""For what is still in the pipe of a process that has ended. A child of its own may hold it open."""


class Child:
    """A process that is listened to. Its standard error waits in a file until somebody asks.

    A context manager, which ends it. `launch` is subprocess.Popen, or the same inside a sandbox; `decode`
    gives what is heard for a line.
    """

    def __init__(
        self,
        argv: Sequence[str],
        launch: Callable[..., subprocess.Popen[bytes]] = subprocess.Popen,
        decode: Callable[[bytes], Any] = bytes,
    ) -> None:
        self.ended = False
        """Whether all that it said was heard, and no more will be."""
        self._decode = decode
        self._lines: SimpleQueue[bytes | None] = SimpleQueue()
        self._errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  # closed in `end`
        self._process = launch(
            argv,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            start_new_session=True,  # Ctrl-C in the terminal is for the parent, which then ends this one
        )
        self.pid = self._process.pid
        self.status, self.wait = self._process.poll, self._process.wait
        """Exit status, negative for a signal; `status` gives None while it runs."""
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()

    def _listen(self) -> None:
        assert self._process.stdout is not None, "started with a pipe"
        with self._process.stdout as lines:
            for line in lines:
                if line.endswith(b"\n"):  # else it was killed while it wrote
                    self._lines.put(line[:-1])
        self._lines.put(None)

    def hear(self, timeout_s: float) -> list[Any]:
        """What it says within `timeout_s`; less when something comes. Empty once it has ended."""
        found: list[Any] = []
        with contextlib.suppress(Empty):
            while not self.ended:
                line = self._lines.get(timeout=0.0 if found else max(0.0, timeout_s))
                if line is None:
                    self.ended = True
                else:
                    found.append(self._decode(line))
        return found

    def send(self, line: bytes) -> None:
        """Write a line to its standard input; nothing happens where the process no longer listens."""
        assert self._process.stdin is not None, "started with a pipe"
        with contextlib.suppress(BrokenPipeError):  # its end is seen, and judged, where its output is read
            self._process.stdin.write(line + b"\n")
            self._process.stdin.flush()

    def complaint(self) -> str:
        """Last line of its standard error."""
        self._errors.seek(0)
        return reason(self._errors.read())

    def killed(self, what: str) -> bool:
        """Whether it was killed. Raises BadInputError or PsiKvError when it ended otherwise; `what` it is."""
        if (status := self.status()) in {None, -signal.SIGKILL}:
            return status is not None
        if status == BadInputError.exit_status:
            raise BadInputError(self.complaint())
        raise PsiKvError(f"{what} ended with status {status}: {self.complaint()}")

    def end(self) -> None:
        """SIGTERM, or SIGKILL where that does not help; its last lines are heard. Safe to call twice."""
        if self.status() is None:
            self._process.terminate()
            try:
                self.wait(_END_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self.wait()
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
