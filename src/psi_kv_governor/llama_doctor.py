"""What llama.cpp needs here: a compiler, the library, the agent, a model, devices; and what can be given back
of a model that is opened. `psi-kv doctor` finds this module by its entry point."""

from __future__ import annotations

import sys
from collections.abc import Generator, Iterator
from pathlib import Path

from psi_kv_governor.amounts import mib
from psi_kv_governor.cache import Capabilities, Capability, Description, Domain, Plan, Range, Step, Verb
from psi_kv_governor.checks import Check, Look, State
from psi_kv_governor.config import GovernorConfig
from psi_kv_governor.engines.llama import devices, loader
from psi_kv_governor.errors import EngineError, PsiKvError
from psi_kv_governor.model import check, demo_model_path
from psi_kv_governor.native import building

_PROBE_CELLS = 2048  # large enough that its cache is governed, with room for a range to park

HOST_INSTEAD = (
    "offload_kqv=False (--no-kv-offload) has keys and values in the host's memory, where each page of an "
    "idle conversation can be given back, bit for bit the same. It costs speed: those of each layer go to "
    "the device for each token (62 parts of a graph instead of 2 with the demo model)"
)


def in_use() -> bool:
    """See `EngineChecks`."""
    return "llama_cpp" in sys.modules


def looks(config: GovernorConfig, model: Path | None) -> Generator[Look, list[Check], None]:
    """See `EngineChecks`. A model is opened where there is one, and nothing before it failed."""
    found: list[Check] = []
    for look in (
        Look("compiler", lambda: [check_compiler()], "warn"),
        Look("llama.cpp", lambda: [check_llama()], "warn"),
        Look("agent", lambda: [check_agent()]),
        Look("model", lambda: [check_model(model)], "warn"),
    ):
        found += yield look
    states = {one.name: one.state for one in found}
    if states["model"] == "ok" and "fail" not in {states["llama.cpp"], states["agent"]}:
        yield Look("devices", lambda: [check_devices()], "warn")
        yield Look("engine", lambda: check_engine(model or demo_model_path(), config))


def check_compiler() -> Check:
    """The C compiler that builds the agent where it did not come compiled."""
    try:
        return Check("compiler", "ok", building.compiler())
    except EngineError as error:
        shipped = building.shipped()
        state: State = "ok" if shipped else "warn"
        return Check(
            "compiler",
            state,
            "none" + (": the agent came compiled" if shipped else ""),
            "" if shipped else str(error),
        )


def check_llama() -> Check:
    """llama-cpp-python; programs under `psi-kv exec` bring their own llama.cpp."""
    try:
        return Check(
            "llama.cpp", "ok", f"{loader.llama_cpp_version()} in {loader.llama_cpp_library().parent}"
        )
    except EngineError as error:
        return Check("llama.cpp", "warn", "not usable from Python; psi-kv exec works without", str(error))


def check_agent() -> Check:
    """The agent between a program and llama.cpp: without it nothing can be returned."""
    try:
        return Check("agent", "ok", str(building.agent_path()))
    except EngineError as error:
        return Check("agent", "fail", "can't be had, so that no memory can be returned", str(error))


def check_model(model: Path | None = None) -> Check:
    """The model file; None is the demo model, which need not be here."""
    try:
        found = check(model or demo_model_path())
    except PsiKvError as error:
        return Check("model", "warn" if model is None else "fail", "not usable", str(error))
    size = f"{found.size_bytes / 1e6:,.0f} MB"
    return Check("model", "ok", f"{found.path} ({found.architecture}, {found.tensors} tensors, {size})")


def check_devices() -> Check:
    """Each device that llama.cpp can compute on here, and what of a cache on it can be returned."""
    why = loader.load().why
    if why:
        return Check("devices", "warn", "not looked at", why)
    found = [one for one in devices.devices() if one.is_gpu]
    if not found:
        return Check("devices", "ok", "none but the processor: caches are in the host's memory, page by page")
    named = [f"{one.name}: {one.about}, {one.kind}, {_memory(one)}" for one in found]
    more = [f"{one.name} returns {devices.what_goes_back(one)}" for one in found]
    shared = [one.name for one in found if one.kind == "integrated GPU"]
    if shared:
        more.append(
            f"{', '.join(shared)} takes the machine's own memory: the machine's headroom counts it, a "
            "cgroup's does not"
        )
    return Check("devices", "ok", "; ".join(named), more=(*more, HOST_INSTEAD))


def check_cache(description: Description) -> Check:
    """Where the cache of a model is that was opened."""
    where = description.details.get("backing", "")
    if description.domain is Domain.HOST:
        return Check("cache", "ok", f"in the host's memory, page by page: {where}".removesuffix(": "))
    return Check("cache", "ok", where, more=(HOST_INSTEAD,))


def offload() -> int:
    """Layers for a model that is opened to look at it: all of them, where there is a device."""
    return -1 if any(one.is_gpu for one in devices.devices()) else 0


def _memory(one: devices.Device) -> str:
    if not one.total_bytes:
        return "whose driver does not tell its memory"
    return f"{mib(one.free_bytes)} of {mib(one.total_bytes)} free"


def check_engine(model: Path, config: GovernorConfig) -> Iterator[Check]:
    """Open the model in a small context, and give up a part of it: what is told was done."""
    try:
        from psi_kv_governor.llama import GovernedLlama

        llm = GovernedLlama(
            str(model),
            config=GovernorConfig(
                place=config.place,
                place_limit_bytes=config.place_limit_bytes,
                place_reserve_bytes=config.place_reserve_bytes,
            ),
            n_ctx=_PROBE_CELLS,
            flash_attn=True,
            auto=False,
            n_gpu_layers=offload(),
            verbose=False,
        )
    except (PsiKvError, ValueError, RuntimeError, OSError) as error:  # the last three are llama_cpp's own
        yield Check("engine", "fail", "the model can't be opened", " ".join(str(error).split()))
        return
    try:
        llm.eval([llm.token_bos()] * 600)
        engine = llm.governor.engine
        caches = engine.snapshot().caches
        able = engine.describe().capabilities
        returned = sum(
            engine.apply(
                Plan(steps=(Step(verb=verb, cache=cache.id, sequence=sequence.id, ranges=(Range(64, 512),)),))
            ).bytes_returned
            for cache in caches
            for sequence in cache.sequences
            for verb in _trial(able, maskable=cache.maskable)
        )
        yield check_cache(engine.describe())
        yield _step("release", able.release, "fail")
        told = f"yes: {mib(returned)} went back in a trial"
        yield _step("park", able.park, "warn", told)
        yield _step("mask", able.mask, "warn")
        gone = f"{told}. Without a place, what running conversations give is gone until it is decoded again"
        yield _step("evict", able.evict, "ok" if able.park.able else "warn", gone)
        if llm.context_params.flash_attn_type != 1:
            return
        yield Check(
            "flash attention",
            "ok",
            "is off unless a program asks for it; with it running conversations can give too",
        )
    finally:
        llm.close()


def _trial(able: Capabilities, *, maskable: bool) -> Iterator[Verb]:
    """What gives up a part of a cache here."""
    if able.evict.able:
        yield Verb.EVICT
    else:
        yield Verb.MASK if maskable else Verb.PARK


def _step(name: str, capability: Capability, without: State, detail: str = "yes") -> Check:
    if capability.able:
        return Check(f"can {name}", "ok", detail)
    return Check(f"can {name}", without, "no", capability.why)
