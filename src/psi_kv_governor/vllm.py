"""vLLM governed: the connector with a governor beside its scheduler, as vLLM makes it by name.

Nothing here is for calling: `psi-kv exec -- vllm serve ...`, or `--kv-transfer-config '{"kv_connector":
"PsiKvConnector", "kv_role": "kv_both"}'` where the package is installed beside vLLM.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from typing import Any

from psi_kv_governor.config import GovernorConfig
from psi_kv_governor.control.room import plenty_bytes
from psi_kv_governor.engines.vllm import versions
from psi_kv_governor.engines.vllm.connector import Connector
from psi_kv_governor.engines.vllm.engine import VllmEngine
from psi_kv_governor.engines.vllm.hosts import HostsSource, far_levels
from psi_kv_governor.engines.vllm.scheduling import Scheduling
from psi_kv_governor.engines.vllm.unpublished import Waker
from psi_kv_governor.engines.vllm.working import this_host
from psi_kv_governor.governor import Governor
from psi_kv_governor.pressure import discover
from psi_kv_governor.pressure.neighbours import Neighbours
from psi_kv_governor.pressure.reading import PressureSource

_log = logging.getLogger("vllm.psi_kv_governor")


class Governing:
    """One engine core. The governor begins when every worker has said how it stands."""

    def __init__(self, config: Any, cache: Any, settings: GovernorConfig) -> None:
        n_blocks = cache.num_blocks
        n_bytes = max((one.size for one in cache.kv_cache_tensors), default=0)
        self.all = Scheduling(
            n_blocks,
            config.cache_config.block_size,
            config.parallel_config.world_size,
            n_bytes // max(1, n_blocks),
        )
        self.all.on_ready = self._ready
        self.waker = Waker()
        self.all.wake = self.waker
        self._settings = settings
        self._closed = False
        self._governor: Governor | None = None
        self._lock = threading.Lock()
        name = str(getattr(config.model_config, "served_model_name", None) or config.model_config.model)
        self.engine = VllmEngine(self.all, name, versions.installed())

    def _ready(self) -> None:
        """In the engine's thread, which waits for nothing of this: making a source takes a moment."""
        threading.Thread(target=self._start, name="psi-kv-start", daemon=True).start()

    def _start(self) -> None:
        try:
            source = self._source() if self.all.world_size > 1 else None
            near = None if source is None else Neighbours(processes=self._pids)
            governor = Governor(
                self.engine, source=source, config=self._settings, name="vllm", neighbours=near
            )
            with self._lock:
                if self._closed:
                    governor.close()
                    return
                self._governor = governor
            governor.start()
        except Exception as error:
            _log.warning(
                "vLLM runs ungoverned: its governor did not start (%s: %s)", type(error).__name__, error
            )
            return
        ranks = list(self.all.ranks.values())
        why = self.all.why_not or (ranks[0].why_not if ranks else "")
        _log.info(
            "vLLM is governed: %d blocks of %d KiB%s%s",
            self.all.n_blocks,
            self.all.block_bytes >> 10,
            f", but nothing can be given up: {why}" if why else "",
            f"; {self.waker.why_not}" if self.waker.why_not else "",
        )

    def _source(self) -> PressureSource | None:
        """This host's own, and the workers' where they see something else."""
        own = discover(processes=self._pids).source
        if own is None:
            return None
        self.all.far = far_levels(own.read().levels, self.all.ranks)
        return HostsSource(
            own,
            lambda: self.all.ranks,
            lambda: time.monotonic() - self.all.looked_s,
            self.all.look_again,
            lambda limit_bytes: plenty_bytes(self._settings, limit_bytes),
        )

    def _pids(self) -> list[int]:
        """Workers on this host, which hold the cache."""
        here = this_host()
        return [about.pid for about in self.all.ranks.values() if about.host == here] or [os.getpid()]

    def close(self) -> None:
        """The governor ends; who stands still goes on."""
        with self._lock:
            self._closed = True
            governor, self._governor = self._governor, None
        if governor is not None:
            governor.close()
        self.engine.close()


class PsiKvConnector(Connector):
    """See the module."""

    def govern(self, config: Any, cache: Any, settings: GovernorConfig) -> Governing:
        """See Connector."""
        return Governing(config, cache, settings)
