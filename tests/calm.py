"""Settings with which a governor does nothing by itself, whatever else the machine is doing meanwhile.

For tests that give an order to a governed program and look at what came of that: beside other tests, or on a
machine with little memory, the governor itself would give or bring back something too.
"""

CALM = {
    # Stall counts only where nothing else happens ...
    "PSI_KV_HIGH": "1",
    "PSI_KV_ACUTE_FULL": "1",
    # ... and any headroom is plenty, however it falls.
    "PSI_KV_HEADROOM_LOW": "0",
    "PSI_KV_HEADROOM_LOW_BYTES": "0",
    "PSI_KV_HEADROOM_PLENTY": "0",
    "PSI_KV_HEADROOM_PLENTY_BYTES": "0",
    "PSI_KV_LEAD_S": "0",
    "PSI_KV_QUIET_S": "36000",
}
