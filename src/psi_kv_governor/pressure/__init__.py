"""Sources that read the machine's memory pressure, and the discovery that says which one there is."""

from psi_kv_governor.pressure.discovery import Candidate, Discovery, discover
from psi_kv_governor.pressure.machine import MachineSource
from psi_kv_governor.pressure.reading import PressureSource, Reading
from psi_kv_governor.pressure.trace import TraceSource, read_trace, write_trace

__all__ = [
    "Candidate",
    "Discovery",
    "MachineSource",
    "PressureSource",
    "Reading",
    "TraceSource",
    "discover",
    "read_trace",
    "write_trace",
]
