"""Where a service listens: HOST:PORT as a person writes it."""

from __future__ import annotations

from typing import NamedTuple

from psi_kv_governor.errors import BadInputError

LOOPBACK = "127.0.0.1"


class Address(NamedTuple):
    """A host and a port; port 0 is any that is free."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def address(text: str, option: str) -> Address:
    """`9464`, `127.0.0.1:9464`, `[::1]:9464`. Without a host it is this machine alone.

    Raises BadInputError.
    """
    host, _, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not port.isascii() or not port.isdigit() or int(port) > 65535 or any(char.isspace() for char in host):
        raise BadInputError(f"{option} {text} is no address: give PORT or HOST:PORT, e.g. {LOOPBACK}:9464")
    return Address(host or LOOPBACK, int(port))
