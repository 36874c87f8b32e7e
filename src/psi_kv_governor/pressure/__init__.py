"""Sources that read the machine's memory pressure, and the discovery that says which one there is."""

from psi_kv_governor.pressure.discovery import Candidate, Discovery, discover
from psi_kv_governor.pressure.machine import MachineSource
from psi_kv_governor.pressure.reading import Level, Neighbour, PressureSource, Reading, one_level
from psi_kv_governor.pressure.trace import TraceSource, read_trace, write_trace

__all__ = [
    "Candidate",
    "Discovery",
    "Level",
    "MachineSource",
    "Neighbour",
    "PressureSource",
    "Reading",
    "TraceSource",
    "discover",
    "one_level",
    "read_trace",
    "write_trace",
]
