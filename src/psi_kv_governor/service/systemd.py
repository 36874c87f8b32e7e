"""Tells a service manager how we stand (sd_notify): one datagram, and nothing where nobody listens."""

from __future__ import annotations

import contextlib
import os
import socket


def notify(state: str) -> None:
    """Send `state` (for instance `READY=1`) to $NOTIFY_SOCKET. Source: sd_notify(3)."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
        sender.settimeout(1.0)
        sender.connect(address if address[0] == "/" else f"\0{address[1:]}")
        sender.sendall(state.encode())
