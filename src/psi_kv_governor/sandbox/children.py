"""Processes that speak in lines on standard output, several at a time."""

from __future__ import annotations

import os
import selectors
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import IO, Any, Protocol

from psi_kv_governor.sandbox import guardian

_END_TIMEOUT_S = 10.0
"""A process that waits for its pages from swap answers SIGTERM late; after this it is killed."""
_READ_BYTES = 1 << 16


class Launch(Protocol):
    """How a process is started: subprocess.Popen, or the same inside a sandbox."""

    def __call__(self, argv: Sequence[str], **options: Any) -> subprocess.Popen[bytes]: ...


class Child:
    """A process whose lines are collected. Its standard error waits in a file until somebody asks."""

    def __init__(self, argv: Sequence[str], launch: Launch) -> None:
        self._errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  # closed in `end`
        self._process = launch(
            argv,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env={**os.environ, "PYTHONPATH": guardian.package_path()},
            start_new_session=True,  # Ctrl-C in the terminal is for the parent, which then ends this one
        )
        self._rest = b""

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def output(self) -> IO[bytes]:
        assert self._process.stdout is not None, "started with a pipe"
        return self._process.stdout

    def status(self) -> int | None:
        """Exit status, negative for a signal; None while it runs."""
        return self._process.poll()

    def wait(self) -> int:
        """Exit status, once it has ended."""
        return self._process.wait()

    def send(self, line: bytes) -> None:
        """Write a line to its standard input; nothing happens where the process no longer listens."""
        assert self._process.stdin is not None, "started with a pipe"
        try:
            self._process.stdin.write(line + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:  # its end is seen, and judged, where its output is read
            return

    def read(self) -> list[bytes] | None:
        """The whole lines that have come since; None at the end. Blocks where there is nothing to read."""
        data = os.read(self.output.fileno(), _READ_BYTES)
        if not data:
            return None
        *lines, self._rest = (self._rest + data).split(b"\n")
        return lines

    def complaint(self) -> str:
        """Last line of its standard error."""
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else ""

    def end(self) -> list[bytes]:
        """SIGTERM, and SIGKILL where that does not help; then give its pipes back. Safe to call twice.

        Gives the lines that it said and nobody has heard yet.
        """
        if self.output.closed:
            return []
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(_END_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        said = self._last_lines()
        for pipe in (self._process.stdin, self._process.stdout, self._errors):
            if pipe is not None:
                _close(pipe)
        return said

    def _last_lines(self) -> list[bytes]:
        """What is still in the pipe of a process that has ended. A child of its own may hold it open."""
        os.set_blocking(self.output.fileno(), False)
        said: list[bytes] = []
        try:
            while (lines := self.read()) is not None:
                said += lines
        except BlockingIOError:
            pass
        return said


def _close(pipe: IO[bytes]) -> None:
    try:
        pipe.close()
    except BrokenPipeError:  # what was still to be written to a process that has ended
        return


class Children:
    """Starts children, hears them all, and ends those that are left. A context manager."""

    def __init__(self, launch: Launch) -> None:
        self._launch = launch
        self._selector = selectors.DefaultSelector()
        self._all: list[Child] = []
        self._heard: list[Child] = []
        """Those that may still say something."""

    def start(self, argv: Sequence[str]) -> Child:
        """Start a process and listen to it."""
        child = Child(argv, self._launch)
        self._all.append(child)
        self._heard.append(child)
        self._selector.register(child.output, selectors.EVENT_READ, child)
        return child

    def hear(self, timeout_s: float) -> Iterator[tuple[Child, bytes | None]]:
        """Lines that come within `timeout_s`, with the child that said them; None says that it ended."""
        for key, _ in self._selector.select(max(0.0, timeout_s)):
            child: Child = key.data
            lines = child.read()
            if lines is None:
                self._heard.remove(child)
                self._selector.unregister(key.fileobj)
                yield child, None
            for line in lines or ():
                yield child, line

    def end(self, child: Child) -> list[bytes]:
        """End one of them. Gives its last lines."""
        if child in self._heard:
            self._heard.remove(child)
            self._selector.unregister(child.output)
        return child.end()

    def __enter__(self) -> Children:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for child in self._all:
            child.end()
        self._selector.close()
