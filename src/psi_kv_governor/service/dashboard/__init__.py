"""The dashboard: one page about one governed process, with a token, for this machine alone."""

from psi_kv_governor.service.dashboard.server import DashboardServer
from psi_kv_governor.service.dashboard.subject import Governed, Subject, Watched

__all__ = ["DashboardServer", "Governed", "Subject", "Watched"]
