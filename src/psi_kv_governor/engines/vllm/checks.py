"""What of a vLLM configuration can't be governed: one clause each, asked on every rank alike."""

from __future__ import annotations

from typing import Any

ON_A_DEVICE = (
    "its KV cache is on a {device}: device memory is not made of the system's pages, and giving back parts "
    "of a pool on it (CUDA VMM) is not built"
)


def why_not(config: Any, cache_config: Any, device: str) -> str:
    """Why this engine runs ungoverned, in one clause; '' where it is governed."""
    if device != "cpu":
        return ON_A_DEVICE.format(device=device)
    model, parallel = getattr(config, "model_config", None), getattr(config, "parallel_config", None)
    if getattr(model, "enable_sleep_mode", False):
        return "sleep mode empties the cache by itself: leave --enable-sleep-mode out"
    if getattr(cache_config, "has_mamba_layers", False) or _has_states(cache_config):
        return "the model keeps states (Mamba) beside its blocks, which can't be parked one by one"
    eager = getattr(model, "enforce_eager", False) or _mode(config) == 0
    if getattr(parallel, "pipeline_parallel_size", 1) > 1 and eager:
        return "vLLM itself ends with --enforce-eager and several pipeline stages: leave one of them out"
    if getattr(parallel, "decode_context_parallel_size", 1) > 1:
        return "blocks that are spread over ranks (decode context parallelism) were never tried"
    return ""


def _mode(config: Any) -> int | None:
    """How the model is compiled; 0 is not at all, and no warm-up makes the tensors between stages then."""
    mode = getattr(getattr(config, "compilation_config", None), "mode", None)
    return None if mode is None else int(mode)


def _has_states(cache_config: Any) -> bool:
    groups = getattr(cache_config, "kv_cache_groups", ())
    specs = [getattr(group, "kv_cache_spec", None) for group in groups]
    return any("Mamba" in type(spec).__name__ for spec in specs)
