"""What vLLM loads in each of its processes (entry point `vllm.general_plugins`): makes the connector known.

It changes nothing unless the connector is asked for: `--kv-transfer-config '{"kv_connector":
"PsiKvConnector", "kv_role": "kv_both"}'`, which `psi-kv exec -- vllm serve ...` writes by itself.
"""

from __future__ import annotations

import logging

from psi_kv_governor.engines.vllm.versions import installed, why_not

CONNECTOR = "PsiKvConnector"
MODULE = "psi_kv_governor.vllm"

_log = logging.getLogger("psi_kv_governor")


def register() -> None:
    """Make the connector known to vLLM. Raises nothing: vLLM goes on as without us."""
    if why := why_not(installed()):
        _log.warning("vLLM is not governed: %s", why)
        return
    try:
        from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

        KVConnectorFactory.register_connector(CONNECTOR, MODULE, CONNECTOR)
    except ValueError:
        return  # loaded twice in this process: it is known
    except Exception as error:
        _log.warning("vLLM is not governed: its list of connectors is not as it was (%s)", error)
