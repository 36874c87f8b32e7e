"""Figures beside vLLM's own at its `/metrics`, by the way that a connector has for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from prometheus_client import Counter, Gauge
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

from psi_kv_governor.engines.vllm.figures import COUNTERS, GAUGES, added


@dataclass
class Stats(KVConnectorStats):
    """Figures since the last step."""

    def reset(self) -> None:
        """See KVConnectorStats."""
        self.data.clear()

    def aggregate(self, other: KVConnectorStats) -> Stats:
        """See KVConnectorStats."""
        return Stats(data=added(self.data, other.data))

    def reduce(self) -> dict[str, int | float]:
        """See KVConnectorStats."""
        return dict(self.data)

    def is_empty(self) -> bool:
        """See KVConnectorStats."""
        return not self.data


class PromMetrics(KVConnectorPromMetrics):
    """Registers them, with vLLM's labels."""

    def __init__(
        self,
        vllm_config: Any,
        metric_types: dict[Any, Any],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        self._known = {
            name: metric_types[kind](name=f"psi_kv_vllm_{name}", documentation=about, labelnames=labelnames)
            for kind, figures in ((Gauge, GAUGES), (Counter, COUNTERS))
            for name, about in figures.items()
        }
        for labels in per_engine_labelvalues.values():
            for known in self._known.values():
                known.labels(*labels)  # a metric without any labels seen is not shown: 0 is

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        """See KVConnectorPromMetrics."""
        labels = self.per_engine_labelvalues[engine_idx]
        for name, value in transfer_stats_data.items():
            if name in GAUGES:
                self._known[name].labels(*labels).set(value)
            elif name in COUNTERS:
                self._known[name].labels(*labels).inc(value)
