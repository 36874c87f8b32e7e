"""What the connector says in a step that concerns nobody."""

import pickle


def test_a_quiet_step_is_known_in_every_process():
    """It is pickled to the workers, and told there by what it is."""
    from psi_kv_governor.engines.vllm.connector import QUIET

    assert pickle.loads(pickle.dumps(QUIET)) is QUIET
