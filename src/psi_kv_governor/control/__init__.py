"""What to do about a reading: pure functions and small frozen dataclasses."""

from psi_kv_governor.control.between import bounds, glanced, has_room, nothing_new
from psi_kv_governor.control.decision import Action, CacheSnapshot, Decision, Mode
from psi_kv_governor.control.law import budget_of, decide, pause_s
from psi_kv_governor.control.restoring import SLICE_BYTES
from psi_kv_governor.control.room import spare_bytes
from psi_kv_governor.control.state import LawState
from psi_kv_governor.control.turn import Turn

__all__ = [
    "SLICE_BYTES",
    "Action",
    "CacheSnapshot",
    "Decision",
    "LawState",
    "Mode",
    "Turn",
    "bounds",
    "budget_of",
    "decide",
    "glanced",
    "has_room",
    "nothing_new",
    "pause_s",
    "spare_bytes",
]
