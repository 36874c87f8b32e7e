"""vLLM: a KV cache whose blocks are in memory only while somebody uses them, on one host or many.

`plugin` is what vLLM loads (`vllm.general_plugins`); `connector` is what it makes of it, once beside the
scheduler and once in each worker. Nothing here is imported by the rest of the package.
"""
