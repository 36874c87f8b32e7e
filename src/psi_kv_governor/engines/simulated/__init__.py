"""A simulated engine: it counts bytes, and says truly what was done. For `simulate`, `record` and tests."""

from psi_kv_governor.engines.simulated.cache import CELL_BYTES, PaperCache
from psi_kv_governor.engines.simulated.engine import CAPABLE, SimulatedEngine
from psi_kv_governor.engines.simulated.sequence import PaperSequence

__all__ = ["CAPABLE", "CELL_BYTES", "PaperCache", "PaperSequence", "SimulatedEngine"]
