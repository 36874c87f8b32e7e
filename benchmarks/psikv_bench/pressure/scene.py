"""The scene of `psi-kv demo` with every load and variant, watched from outside all the time."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import msgspec

from psi_kv_governor.errors import BadInputError, PsiKvError
from psi_kv_governor.model import check
from psi_kv_governor.pressure.headroom import machine_headroom
from psi_kv_governor.sandbox.scene_options import CALM_TOKENS
from psikv_bench import messages
from psikv_bench.host import MIB, Host, ModelKilledError
from psikv_bench.messages import Setup, Variant
from psikv_bench.pressure.result import SceneResult, Seen, result_of
from psikv_bench.watch import Watcher
from psikv_bench.worker import Worker

_OUTSIDE_SHARE = 0.25
"""Of what is available, that a neighbour outside a sandbox may take: far from any pressure."""
_LOOK_S = 0.1
"""Below it the counters of PSI get coarse."""
_OPEN_S = 3600.0
_STEP_S = 300.0
"""A sandbox that is far too small makes a single step of the model last for ever."""
_RESTORE_MAX_S = 30.0

OnMessage = Callable[[messages.Message], None]
_M = TypeVar("_M", bound=messages.Message)


class SceneOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What the scene is made of."""

    setup: Setup
    """The model's process, whatever the variant."""
    tokens: int
    """Decoded under pressure."""
    limit_bytes: int | None = None
    """Of the sandbox; None: it is played in none, and the machine is never filled (`outside_bytes`)."""
    swap_bytes: int = 0
    pressure_bytes: int = 0
    """What the neighbour takes; 0: there is none."""
    neighbour: tuple[str, ...] = ()
    """Its command."""
    warmup_s: float = 0.0
    """It works so long before the model decodes."""
    decode_max_s: float = 60.0
    """A run that has come to a stand is cut off here, and counts with the tokens that it got done."""


def run_scene(
    variant: Variant, options: SceneOptions, on_message: OnMessage = lambda message: None
) -> SceneResult:
    """Run one variant from beginning to end. One that the kernel kills is a result.

    Everything that it starts is gone when it returns or raises. Raises BadInputError for a file that is no
    model and for a neighbour that is too much for the machine outside a sandbox, PsiKvError where no sandbox
    is to be had or the model cannot be run.
    """
    check(Path(options.setup.model))
    if options.limit_bytes is None and options.pressure_bytes > (most := outside_bytes()):
        raise BadInputError(
            f"outside a sandbox the neighbour may take {most // MIB} MiB, a quarter of what is available: "
            f"{options.pressure_bytes // MIB} MiB are too much"
        )
    setup = msgspec.structs.replace(options.setup, variant=variant)
    with Host(setup, options.limit_bytes, options.swap_bytes) as host:
        playing = _Playing(variant, options, host, on_message)
        with Watcher(host.sandbox, host.pid, _LOOK_S) as watcher:
            playing.play()
        return result_of(playing.seen, watcher.looks, host.said)


class _Playing:
    """One run."""

    def __init__(self, variant: Variant, options: SceneOptions, host: Host, on_message: OnMessage) -> None:
        self.seen = Seen(variant=variant)
        self._options, self._host, self._on_message = options, host, on_message

    def play(self) -> None:
        """All of it."""
        host, seen = self._host, self.seen
        try:
            self._until(messages.Opened, _OPEN_S)
            host.order(Worker.decode, tokens=CALM_TOKENS, stage="calm")
            seen.calm_tokens_per_s = CALM_TOKENS / self._until(messages.Done).seconds
        except ModelKilledError:
            raise PsiKvError(
                f"the model alone does not fit into {(self._options.limit_bytes or 0) // MIB} MiB: give a "
                "higher limit or a smaller context"
            ) from None
        with contextlib.suppress(ModelKilledError):  # that is a result
            self._press()
            host.order(Worker.settle, max_s=_RESTORE_MAX_S)
            seen.settled = self._until(messages.Looked)

    def _press(self) -> None:
        options, host, seen = self._options, self._host, self.seen
        began_s = time.monotonic()
        with contextlib.suppress(ModelKilledError):  # it is seen again when it is to settle
            if options.pressure_bytes:
                host.bring(options.neighbour)
                self._listen(lambda: bool(host.said))
                warm_s = time.monotonic() + options.warmup_s
                self._listen(lambda: time.monotonic() >= warm_s)
            began_s = time.monotonic()
            host.order(Worker.decode, tokens=options.tokens, max_s=options.decode_max_s)
            seen.seconds = self._until(messages.Done, options.decode_max_s + _STEP_S).seconds
        seen.pressed_s = began_s, time.monotonic()
        seen.neighbour_killed = host.neighbour_killed()
        host.end_neighbour()

    def _until(self, kind: type[_M], timeout_s: float = _STEP_S) -> _M:
        return self._host.until(kind, timeout_s, self._take_in)

    def _listen(self, is_over: Callable[[], bool]) -> None:
        while not is_over():
            for message in self._host.hear(_LOOK_S):
                self._take_in(message)
            self._host.check_alive()

    def _take_in(self, message: messages.Message) -> None:
        self.seen.hear(message, time.monotonic())
        self._on_message(message)


def outside_bytes(root: Path = Path("/")) -> int:
    """The most that a neighbour outside a sandbox may take: a quarter of what is available."""
    found = machine_headroom(root / "proc/meminfo")
    return 0 if found is None else int(found.headroom_bytes * _OUTSIDE_SHARE)
