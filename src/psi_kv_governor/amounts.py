"""Amounts as a person reads them."""

from __future__ import annotations


def mib(n_bytes: float, digits: int = 1) -> str:
    """Bytes in MiB."""
    return f"{n_bytes / 2**20:,.{digits}f} MiB"
