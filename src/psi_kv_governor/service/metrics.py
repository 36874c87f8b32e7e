"""A governor's figures for Prometheus: what stands now is read at each scrape, what happened is counted.

Names and units follow the Prometheus rules (base units, `_total` for counters). That a process was saved from
being killed is not counted: nobody can know it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, Counter, Histogram, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from psi_kv_governor.control.decision import Mode
from psi_kv_governor.events import Degraded, Event, ModeChanged, Recomputed, Released, Restored, Trimmed
from psi_kv_governor.governor import Governor
from psi_kv_governor.service.address import Address
from psi_kv_governor.status import Status

_SECONDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
"""Half decades: a trim takes 0.1 s, a restore from a slow disk some seconds."""

REASONS = ("stall", "headroom", "by_hand", "saved_states")


def reason_of(trimmed: Trimmed) -> str:
    """The kind of a trim's reason: the sentence itself has figures in it, and would be a new series each."""
    if trimmed.reason == "by hand":
        return "by_hand"
    if trimmed.reason.startswith("saved states"):
        return "saved_states"
    return "stall" if "% reached" in trimmed.reason or "stand still" in trimmed.reason else "headroom"


class Metrics:
    """The figures of one governor in a registry of their own, from its creation until `close`."""

    def __init__(self, governor: Governor) -> None:
        self.registry = CollectorRegistry()
        self._trims = self._counter("trims", "Times that memory was given up", "reason")
        self._returned = self._counter(
            "returned_bytes", "Bytes that the operating system has again, counted by the kernel", "reason"
        )
        for reason in REASONS:  # a counter that appears with its first event hides that event from rate()
            self._trims.labels(reason)
            self._returned.labels(reason)
        self._released = self._counter("released_bytes", "Bytes of cells nobody used that went back")
        self._restored = self._counter("restored_bytes", "Bytes of masked cells that came back")
        self._recomputed = self._counter("recomputed_tokens", "Tokens that were decoded again")
        self._degraded = self._counter("degraded", "Things that can't be done here any more", "what")
        self._trim_s = self._histogram("trim_seconds", "Time that one trim took")
        self._restore_s = self._histogram("restore_seconds", "Time that one slice of a restore took")
        self._reaction_s = self._histogram(
            "reaction_seconds", "From the reading that began a time of pressure until memory was returned"
        )
        self._pressed_s: float | None = None
        self.registry.register(_Standing(governor.status))
        self._unsubscribe = governor.subscribe(self._take)

    def close(self) -> None:
        """Count nothing more. Safe to call twice."""
        self._unsubscribe()

    def _counter(self, name: str, about: str, *labels: str) -> Counter:
        return Counter(name, f"{about}.", labels, namespace="psikv", registry=self.registry)

    def _histogram(self, name: str, about: str) -> Histogram:
        return Histogram(name, f"{about}.", namespace="psikv", registry=self.registry, buckets=_SECONDS)

    def _take(self, event: Event) -> None:
        if isinstance(event, ModeChanged):
            self._pressed_s = event.time_s if event.new is Mode.TRIMMING else None
        elif isinstance(event, Trimmed):
            reason = reason_of(event)
            self._trims.labels(reason).inc()
            self._returned.labels(reason).inc(event.bytes_returned)
            self._trim_s.observe(event.seconds)
            if self._pressed_s is not None and reason in {"stall", "headroom"}:
                self._reaction_s.observe(max(0.0, event.time_s - self._pressed_s))
                self._pressed_s = None
        elif isinstance(event, Restored):
            self._restored.inc(event.bytes_back)
            self._restore_s.observe(event.seconds)
        elif isinstance(event, Released):
            self._released.inc(event.bytes_returned)
        elif isinstance(event, Recomputed):
            self._recomputed.inc(event.cells)
        elif isinstance(event, Degraded):
            self._degraded.labels(event.what).inc()


class _Standing(Collector):
    """What a status says, asked for at each scrape."""

    def __init__(self, status: Callable[[], Status]) -> None:
        self._status = status

    def describe(self) -> Iterator[Metric]:
        """Nothing: else the governor would be asked when it is registered."""
        yield from ()

    def collect(self) -> Iterator[Metric]:
        status = self._status()
        yield from _levels(status)
        yield from _caches(status)


def _levels(status: Status) -> Iterator[Metric]:
    mode = _gauge("mode", "1 for the mode that the governor is in", "mode")
    for one in Mode:
        mode.add_metric([one.value], float(status.mode is one))
    stall = _gauge("stall_ratio", "Share of time in which some or all tasks stood still", "level", "kind")
    headroom = _gauge("headroom_bytes", "Bytes that can still be taken before the limit is met", "level")
    limit = _gauge("limit_bytes", "The limit that headroom is measured against", "level")
    for level in status.levels:
        for kind, share in (("some", level.some), ("full", level.full)):
            if share is not None:
                stall.add_metric([level.name, kind], share)
        if level.headroom_bytes is not None:
            headroom.add_metric([level.name], level.headroom_bytes)
        if level.limit_bytes is not None:
            limit.add_metric([level.name], level.limit_bytes)
    yield from (mode, stall, headroom, limit)


def _caches(status: Status) -> Iterator[Metric]:
    amounts = {"live_bytes": 0, "masked_bytes": 0}
    cells = dict.fromkeys(((run, at) for run in ("running", "idle") for at in ("live", "masked", "lost")), 0)
    sequences = {"running": 0, "idle": 0}
    for cache in status.caches:
        for one in cache.sequences:
            run = "running" if one.running else "idle"
            sequences[run] += 1
            cells[run, "live"] += one.live_cells
            cells[run, "masked"] += one.masked_cells
            cells[run, "lost"] += one.lost_cells
            amounts["live_bytes"] += one.live_cells * cache.cell_bytes
            amounts["masked_bytes"] += one.masked_cells * cache.cell_bytes
    yield GaugeMetricFamily("psikv_caches", "Caches that are governed.", len(status.caches))
    for name, value, about in (
        ("live_bytes", amounts["live_bytes"], "What attention looks at, in memory or not"),
        ("masked_bytes", amounts["masked_bytes"], "Parked, and passed over by attention"),
        ("resident_bytes", status.resident_bytes, "Of all caches and saved states, counted by the kernel"),
        ("parked_bytes", status.parked_bytes, "In a file and not in memory, masked ones included"),
        ("dirty_bytes", status.dirty_bytes, "In memory, and to be written before they can go"),
        ("affected_tokens", status.affected_tokens, "Tokens decoded while others were masked or lost"),
    ):
        yield GaugeMetricFamily(f"psikv_{name}", f"{about}.", value)
    written = CounterMetricFamily("psikv_written_bytes", "Written for parking: the wear of the disk.")
    written.add_metric([], status.written_bytes)
    of_state = _gauge("cells", "Cells by what their sequence does and where they are", "sequence", "state")
    for labels, value in cells.items():
        of_state.add_metric(labels, value)
    in_state = _gauge("sequences", "Sequences that are being decoded, and that are not", "state")
    for state, value in sequences.items():
        in_state.add_metric([state], value)
    yield from (written, of_state, in_state)


def _gauge(name: str, about: str, *labels: str) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"psikv_{name}", f"{about}.", labels=labels)


class MetricsServer:
    """`GET /metrics` of one governor, in a thread of its own, from its creation until `close`."""

    def __init__(self, governor: Governor, address: Address) -> None:
        """Raises OSError where the address can't be listened at."""
        self._metrics = Metrics(governor)
        self._server: WSGIServer
        self._thread: threading.Thread
        try:
            self._server, self._thread = start_http_server(
                address.port, address.host, registry=self._metrics.registry
            )
        except BaseException:
            self._metrics.close()
            raise

    @property
    def port(self) -> int:
        """Where it listens: another than was asked for where that was 0."""
        return int(self._server.server_port)

    def close(self) -> None:
        """Listen no more: within half a second."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
        self._metrics.close()
