"""The KV connector that vLLM makes, once beside the scheduler and once in each worker.

It moves no KV between engines. Its hooks are where the cache is allocated (`get_mem_pool_context`), where a
step begins and ends, and where a worker may answer. None of them raises into vLLM: what fails is said once,
and the engine goes on as without us.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorWorkerMetadata,
    SupportsHMA,
)
from vllm.platforms import current_platform

from psi_kv_governor.config import GovernorConfig, load_config
from psi_kv_governor.engines.vllm import checks, versions
from psi_kv_governor.engines.vllm.messages import Report, Step
from psi_kv_governor.engines.vllm.metrics import PromMetrics, Stats
from psi_kv_governor.engines.vllm.scheduling import Scheduling
from psi_kv_governor.engines.vllm.working import Working

_log = logging.getLogger("vllm.psi_kv_governor")
_T = TypeVar("_T")


@dataclass
class StepMetadata(KVConnectorMetadata):
    """From the scheduler's side to the workers."""

    step: Step


class Quiet(KVConnectorMetadata):
    """Nothing is to be done in a step. There is one, in each process: it is known by `is`."""

    def __reduce__(self) -> str:
        return "QUIET"


QUIET = Quiet()
"""Of nearly all steps. A step of a small model takes 10 ms: building, sending and looking through an empty
`Step` was a hundredth of that."""


@dataclass
class ReportMetadata(KVConnectorWorkerMetadata):
    """From the workers to the scheduler's side."""

    report: Report

    def aggregate(self, other: KVConnectorWorkerMetadata) -> ReportMetadata:
        """Answers of two ranks as one."""
        if not isinstance(other, ReportMetadata):
            return self
        return ReportMetadata(self.report.merged(other.report))


def _harmless(otherwise: Any = None) -> Callable[[Callable[..., _T]], Callable[..., _T]]:
    """A failure of ours is said once and ends the governing of this process, not vLLM."""

    def wrap(method: Callable[..., _T]) -> Callable[..., _T]:
        @functools.wraps(method)
        def call(self: Connector, *args: Any, **kwargs: Any) -> _T:
            try:
                return method(self, *args, **kwargs)
            except Exception as error:
                self.give_up(f"{method.__name__} failed ({type(error).__name__}: {error})")
                return otherwise  # type: ignore[no-any-return]

        return call

    return wrap


class Governing(Protocol):
    """What stands beside the scheduler."""

    all: Scheduling

    def close(self) -> None:
        """Govern nothing any more."""


class Connector(KVConnectorBase_V1, SupportsHMA):
    """See the module. Its governor comes from who knows one (`psi_kv_governor.vllm`)."""

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        self._worker: Working | None = None
        self._scheduler: Governing | None = None
        try:
            why = versions.why_not(versions.installed())
            why = why or checks.why_not(vllm_config, kv_cache_config, current_platform.device_type)
            if not why:
                self._begin(vllm_config, role, kv_cache_config)
        except Exception as error:
            why = f"{type(error).__name__}: {error}"
        if why:
            self.give_up(why)

    def _begin(self, config: Any, role: KVConnectorRole, cache: Any) -> None:
        settings = _settings(config)
        n_bytes = sum({id(one): one.size for one in cache.kv_cache_tensors}.values())
        if role is KVConnectorRole.SCHEDULER:
            self._scheduler = self.govern(config, cache, settings)
        else:
            self._worker = Working(settings, config.parallel_config.rank, cache.num_blocks, n_bytes)

    def govern(self, config: Any, cache: Any, settings: GovernorConfig) -> Governing:
        """Make the governor of an engine."""
        raise NotImplementedError

    def give_up(self, why: str) -> None:
        """Govern nothing any more in this process."""
        _log.warning("vLLM runs ungoverned: %s", why)
        worker, self._worker = self._worker, None
        scheduler, self._scheduler = self._scheduler, None
        for one in (worker, scheduler):
            try:
                if one is not None:
                    one.close()
            except Exception as error:
                _log.debug("at the end: %s", error)

    @property
    def requires_kv_delivery(self) -> bool:
        """Nothing is handed to another engine."""
        return False

    # -- in a worker ------------------------------------------------------------------------------------

    @_harmless()
    def get_mem_pool_context(self) -> AbstractContextManager[None] | None:
        """See KVConnectorBase_V1."""
        return None if self._worker is None else self._worker.memory_context()

    @_harmless()
    def register_kv_caches(self, kv_caches: dict[str, Any]) -> None:
        """See KVConnectorBase_V1."""
        if self._worker is None:
            return
        if why := self._worker.registered(kv_caches):
            _log.warning("nothing of vLLM's cache can be parked: %s", why)
        else:
            _log.info("vLLM's cache is born in %s", self._worker.about_backing)

    def bind_connector_metadata(self, connector_metadata: KVConnectorMetadata) -> None:
        """See KVConnectorBase_V1: before the forward pass."""
        if connector_metadata is QUIET:
            return
        super().bind_connector_metadata(connector_metadata)
        self._begin_step()

    @_harmless()
    def _begin_step(self) -> None:
        if self._worker is not None and isinstance(self._connector_metadata, StepMetadata):
            self._worker.begin(self._connector_metadata.step)

    def has_connector_metadata(self) -> bool:
        """See KVConnectorBase_V1: whether layers have to be waited for and saved. Never."""
        return False

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """See KVConnectorBase_V1: after the forward pass, or in a step without one."""
        if self._connector_metadata is not None:
            self._end_step()

    @_harmless()
    def _end_step(self) -> None:
        if self._worker is not None and isinstance(self._connector_metadata, StepMetadata):
            self._worker.end(self._connector_metadata.step)

    def wait_for_layer_load(self, layer_name: str) -> None:
        """See KVConnectorBase_V1."""

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None:
        """See KVConnectorBase_V1."""

    def wait_for_save(self) -> None:
        """See KVConnectorBase_V1."""

    def build_connector_worker_meta(self) -> KVConnectorWorkerMetadata | None:
        """See KVConnectorBase_V1."""
        return None if self._worker is None or self._worker.silent else self._report()

    @_harmless()
    def _report(self) -> KVConnectorWorkerMetadata | None:
        return None if self._worker is None else ReportMetadata(self._worker.report())

    # -- beside the scheduler ---------------------------------------------------------------------------

    @_harmless()
    def bind_kv_cache_manager(self, kv_cache_manager: Any) -> None:
        """See KVConnectorBase_V1."""
        self._kv_cache_manager = kv_cache_manager
        if self._scheduler is not None:
            self._scheduler.all.bind(kv_cache_manager)

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        """See KVConnectorBase_V1. Nothing is loaded; a request may be asked to wait for its turn."""
        return (0 if self._may_admit() else None), False

    @_harmless(otherwise=True)
    def _may_admit(self) -> bool:
        return self._scheduler is None or self._scheduler.all.may_admit()

    @_harmless()
    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """See KVConnectorBase_V1."""
        if self._scheduler is not None:
            groups: Iterable[list[int]] = blocks.get_block_ids()
            self._scheduler.all.admitted(request, (block for group in groups for block in group))

    def build_connector_meta(self, scheduler_output: Any) -> KVConnectorMetadata:
        """See KVConnectorBase_V1."""
        return self._step(scheduler_output) or QUIET

    @_harmless()
    def _step(self, output: Any) -> StepMetadata | None:
        if self._scheduler is None or self._scheduler.all.passes_over(output):
            return None
        return StepMetadata(self._scheduler.all.step(output))

    def update_connector_output(self, connector_output: Any) -> None:
        """See KVConnectorBase_V1."""
        meta = getattr(connector_output, "kv_connector_worker_meta", None)
        if meta is not None:
            self._reported(meta)

    @_harmless()
    def _reported(self, meta: Any) -> None:
        if self._scheduler is not None and isinstance(meta, ReportMetadata):
            self._scheduler.all.report(meta.report)

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        """See KVConnectorBase_V1."""
        return False, None

    def request_finished_all_groups(
        self, request: Any, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        """See SupportsHMA."""
        return False, None

    @_harmless(otherwise=False)
    def has_pending_push_work(self) -> bool:
        """See KVConnectorBase_V1: whether an idle engine has to make a step."""
        return self._scheduler is not None and self._scheduler.all.pending()

    def get_kv_connector_stats(self) -> Stats | None:
        """See KVConnectorBase_V1: asked on both sides in each step, and told by the scheduler's."""
        return None if self._scheduler is None or not self._scheduler.all.figures.due else self._stats()

    @_harmless()
    def _stats(self) -> Stats | None:
        told = None if self._scheduler is None else self._scheduler.all.told()
        return Stats(data=told) if told else None

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> Stats | None:
        """See KVConnectorBase_V1."""
        return Stats(data=data or {})

    @classmethod
    def build_prom_metrics(
        cls,
        vllm_config: Any,
        metric_types: dict[Any, Any],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> PromMetrics | None:
        """See KVConnectorBase_V1."""
        return PromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)

    # -- both -------------------------------------------------------------------------------------------

    def shutdown(self) -> None:
        """See KVConnectorBase_V1."""
        for one in (self._worker, self._scheduler):
            if one is not None:
                one.close()


def _settings(config: Any) -> GovernorConfig:
    """PSI_KV_* of the environment, under what the connector's own configuration says."""
    extra = config.kv_transfer_config.kv_connector_extra_config or {}
    return load_config(**extra)
