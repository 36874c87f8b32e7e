"""How a process says its messages."""

from __future__ import annotations

import os
import sys
import threading

import msgspec

from psi_kv_governor.sandbox import messages


class Speaker:
    """Writes messages to standard output, from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # events come from the governor's thread
        self._encoder = msgspec.json.Encoder()

    def say(self, message: messages.Message) -> None:
        """Write one. Raises BrokenPipeError where nobody reads."""
        with self._lock:
            os.write(sys.stdout.fileno(), self._encoder.encode(message) + b"\n")
