"""The scene of `psi-kv demo` with every load and variant, watched from outside all the time."""

from __future__ import annotations

import time
from pathlib import Path

from psi_kv_governor.errors import BadInputError
from psi_kv_governor.model import check
from psi_kv_governor.pressure.headroom import machine_headroom
from psi_kv_governor.sandbox import scene, scene_options
from psi_kv_governor.sandbox.scene_options import CALM_TOKENS, OnEvent
from psikv_bench.host import MIB, Host, neighbour
from psikv_bench.load import LoadKind
from psikv_bench.messages import Setup, Variant
from psikv_bench.pressure.result import SceneResult, result_of
from psikv_bench.watch import Watcher

_OUTSIDE_SHARE = 0.25
"""Of what is available, that a neighbour outside a sandbox may take: far from any pressure."""
_LOOK_S = 0.1
"""Below it the counters of PSI get coarse."""


class SceneOptions(scene_options.SceneOptions, frozen=True, kw_only=True):
    """What the scene is made of."""

    context_cells: int | None = None
    """Cells of the cache; None: as few as will do."""
    mmap: bool = True
    """Weights as a mapped file, or in memory."""
    keep: int | None = None
    tail: int | None = None
    min_prune: int = 64
    """These three are as in Setup."""
    load: LoadKind = "memory"
    rate_bytes_per_s: float = 0.0
    """Of a ramp; 0 is as fast as it can."""
    folder: str = ""
    """Where a neighbour that reads files makes them."""
    seed: int = 1
    """Of what the neighbour fills its memory with."""
    warmup_s: float = 0.0
    """The neighbour works so long before the model decodes."""
    in_sandbox: bool = True
    """Whether it is played in one. Outside, the machine is never filled: see `outside_bytes`."""

    @property
    def isolated(self) -> bool:
        return self.in_sandbox

    @property
    def pressed(self) -> bool:
        return self.pressure_bytes > 0

    def neighbour(self) -> list[str]:
        return neighbour(
            self.load,
            self.pressure_bytes,
            step_mib=max(1, self.step_bytes // MIB),
            pause_s=self.pause_s,
            rate_mib_s=self.rate_bytes_per_s / MIB,
            seed=self.seed,
            folder=self.folder,
        )

    def setup(self, variant: str) -> Setup:
        return Setup(
            variant=variant,  # type: ignore[arg-type]  # one of this scene's own
            model=self.model,
            context_tokens=self.context_tokens,
            context_cells=self.context_cells,
            decoded_tokens=CALM_TOKENS + self.tokens,
            threads=self.threads,
            mmap=self.mmap,
            keep=self.keep,
            tail=self.tail,
            min_prune=self.min_prune,
        )


class _Scene(scene.Scene):
    def __init__(self, variant: Variant, options: SceneOptions, host: Host, on_event: OnEvent) -> None:
        super().__init__(variant, options, host, on_event)
        self._warmup_s = options.warmup_s

    def bring(self) -> None:
        super().bring()
        end_s = time.monotonic() + self._warmup_s
        while time.monotonic() < end_s:
            self.hear()


def run_scene(variant: Variant, options: SceneOptions, on_event: OnEvent = lambda event: None) -> SceneResult:
    """Run one variant from beginning to end: see `psi_kv_governor.sandbox.scene.run_scene`.

    Raises BadInputError for a neighbour that is too much for the machine outside a sandbox.
    """
    check(Path(options.model))
    limit_bytes = options.limit_bytes if options.isolated else None
    if limit_bytes is None and options.pressure_bytes > (most := outside_bytes()):
        raise BadInputError(
            f"outside a sandbox the neighbour may take {most // MIB} MiB, a quarter of what is available: "
            f"{options.pressure_bytes // MIB} MiB are too much"
        )
    with Host(options.setup(variant), limit_bytes, options.swap_bytes) as host:
        played = _Scene(variant, options, host, on_event)
        with Watcher(host.sandbox, host.pid, _LOOK_S) as watcher:
            played.play()
        return result_of(played.seen, watcher.looks, host.said)


def outside_bytes(root: Path = Path("/")) -> int:
    """The most that a neighbour outside a sandbox may take: a quarter of what is available."""
    found = machine_headroom(root / "proc/meminfo")
    return 0 if found is None else int(found.headroom_bytes * _OUTSIDE_SHARE)
