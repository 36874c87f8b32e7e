"""Where the bytes of a cache are: in memory, or parked in a file that reading brings back."""

from psi_kv_governor.residence.backing import Backing, choose_backing, swap_state
from psi_kv_governor.residence.mapping import Mapping
from psi_kv_governor.residence.parts import Done, Part
from psi_kv_governor.residence.place import NO_PLACE, Place, Refusal, Search, check_place, find_place

__all__ = [
    "NO_PLACE",
    "Backing",
    "Done",
    "Mapping",
    "Part",
    "Place",
    "Refusal",
    "Search",
    "check_place",
    "choose_backing",
    "find_place",
    "swap_state",
]
