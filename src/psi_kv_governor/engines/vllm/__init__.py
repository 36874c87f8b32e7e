"""vLLM: a KV cache whose blocks are in memory only while somebody uses them, on one host or many.

`plugin` is what vLLM loads (`vllm.general_plugins`); `psi_kv_governor.vllm` is the connector that it makes of
it, once beside the scheduler and once in each worker.
"""
