"""The governor itself, on a synthetic machine, thousands of times faster than real time."""

from psi_kv_governor.simulation.outcome import Act, Outcome
from psi_kv_governor.simulation.run import Track, replay, simulate
from psi_kv_governor.simulation.scenario import SCENARIOS, Scenario, get_scenario

__all__ = ["SCENARIOS", "Act", "Outcome", "Scenario", "Track", "get_scenario", "replay", "simulate"]
