"""What stands beside a governed program: metrics and the dashboard, where they are asked for."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple, Protocol

from psi_kv_governor.service.address import Address, address

if TYPE_CHECKING:
    from psi_kv_governor.governor import Governor


class Closing(Protocol):
    """Something that runs until it is closed."""

    def close(self) -> None: ...


class Beside(NamedTuple):
    """One of them."""

    name: str
    address: Address
    start: Callable[[Governor], Closing]
    """Raises OSError where its address can't be listened at: the program runs without it then."""


def asked_for(metrics: str | None, dashboard: str | None) -> list[Beside]:
    """What the two options ask for. Raises BadInputError for what is no address, and ModuleNotFoundError
    where the extra is not installed: both before the program is started."""
    asked: list[Beside] = []
    if metrics is not None:
        from psi_kv_governor.service.metrics import MetricsServer

        at = address(metrics, "--metrics")
        asked.append(Beside("metrics", at, lambda governor: MetricsServer(governor, at)))
    if dashboard is not None:
        import psi_kv_governor.service.dashboard  # noqa: F401  # is it installed?

        where = address(dashboard, "--dashboard")
        asked.append(Beside("dashboard", where, lambda governor: _dashboard(governor, where)))
    return asked


def _dashboard(governor: Governor, at: Address) -> Closing:
    from psi_kv_governor.service.dashboard import DashboardServer, Governed

    server = DashboardServer(Governed(governor), at)
    print(f"psi-kv: dashboard at {server.url}", file=sys.stderr, flush=True)
    return server
