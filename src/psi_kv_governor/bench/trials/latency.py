"""From the first sign of need to the bytes returned: onset after onset beside one model."""

from __future__ import annotations

import time
from collections.abc import Callable

import msgspec

from psi_kv_governor.bench.messages import Variant
from psi_kv_governor.bench.record import Say
from psi_kv_governor.bench.trials import messages
from psi_kv_governor.bench.trials.host import MB, Host, ModelKilledError, Setup
from psi_kv_governor.bench.trials.latency_plan import (
    POLLS_S,
    STALL_US,
    LatencyOptions,
    Mode,
    Near,
    Onset,
    near,
)
from psi_kv_governor.bench.trials.sizing import Need, Sizes
from psi_kv_governor.bench.trials.start import Serving, Starter
from psi_kv_governor.bench.trials.watch import Watch, first_fall, first_signal, poll_time
from psi_kv_governor.config import GovernorConfig
from psi_kv_governor.events import Released, Restored, Trimmed

CALM_S = 1.0
"""Decoded in peace first: what the jitter is held against."""
SETTLE_S = 0.5
"""Decoded after a restore."""
LIFTED_BUDGET_PER_MIN = 1e6
"""Hundreds of onsets an hour are the very attack that the budget is a guard against; here it would only
make later onsets wait for the minute to pass."""
_LOOK_S = 0.003
_HEAR_S = 0.01
_RESTORE_TIMEOUT_S = 60.0
_CALM_TIMEOUT_S = 45.0
_CALM_SHARE = 0.2
"""Of the poller's threshold, to which avg10 has to fall before the next onset. It falls from 60 % to 2 % in
35 s; without the wait, the last onset's pressure would pass for an early alarm."""


class Runner(Serving):
    """Runs onsets; one model serves them all, and is started anew where it was killed or is not whole.

    `setup` and `need` come from `sizing.prepared`.
    """

    def __init__(
        self,
        setup: Setup,
        need: Need,
        sizes: Sizes,
        options: LatencyOptions,
        *,
        config: GovernorConfig,
        say: Say,
    ) -> None:
        super().__init__(Starter(setup, need, sizes, options.swap, options.swap_bytes), say)
        self._sizes, self._options, self._config = sizes, options, config

    def run(self, number: int, mode: Mode, variant: Variant) -> Onset:
        """One onset, and back to a calm and whole context. Raises PsiKvError where the model can't be run."""
        host, _ = self._ready(variant)
        line_bytes = self._config.headroom_low * self._sizes.limit_bytes
        seen = _Seen(host, self._sizes, self._options, (mode, variant), line_bytes)
        try:
            onset = seen.play()
            whole = not onset.killed and not self._starter.make_whole(host) and seen.calm()
        finally:
            seen.close()
        killed = onset.killed
        if not whole:
            killed = self._give_up(host) or killed  # also while its context came back
        return msgspec.structs.replace(onset, number=number, whole=whole, killed=killed)


class _Seen:
    """One onset, and what is seen of it."""

    def __init__(
        self, host: Host, sizes: Sizes, options: LatencyOptions, what: tuple[Mode, Variant], line_bytes: float
    ) -> None:
        self._host, self._sizes, self._options = host, sizes, options
        (self._mode, self._variant), self._line_bytes = what, line_bytes
        self._tokens: list[messages.Token] = []
        self._back: list[Trimmed | Released] = []
        self._restored: list[Restored] = []
        self._watch = Watch(host.pen.group, host.pid, _LOOK_S)
        self._began_s = 0.0
        self._restore_began_s = 0.0

    def play(self) -> Onset:
        """Calm, the neighbour, the hold, and the restore while the mode goes on."""
        self._watch.__enter__()
        entered_s = time.monotonic()
        killed = False
        if self._mode != "idle":
            self._host.say(self._mode)
        self._until(lambda: False, CALM_S)
        self._host.bring_neighbour(self._sizes.load_bytes, self._options.rate * MB)
        try:
            self._press()
        except ModelKilledError:
            killed = True
        ended_s = time.monotonic()
        killed = self._host.neighbour_killed() or killed
        self._host.end_neighbour()
        if not killed and self._variant == "psi":
            self._restore()
        return self._onset(entered_s, ended_s, killed)

    def calm(self) -> bool:
        """Wait until avg10 has fallen; whether the model is still there."""
        floor = self._options.avg10 * _CALM_SHARE

        def fallen() -> bool:
            return bool(self._watch.looks) and self._watch.looks[-1].avg10 <= floor

        try:
            self._until(fallen, _CALM_TIMEOUT_S)
        except ModelKilledError:
            return False
        return True

    def close(self) -> None:
        """Look no more."""
        self._watch.__exit__(None, None, None)

    def _press(self) -> None:
        """Until the load is taken, was held, and bytes are back; or the longest hold is over."""
        options = self._options
        ramp_s = self._sizes.load_bytes / (options.rate * MB) if options.rate else 0.0
        most_s = time.monotonic() + ramp_s + options.hold_max_s

        def done() -> bool:
            taken = self._host.said_at("taken")
            held = taken is not None and time.monotonic() - taken.time_s >= options.hold_s
            return self._host.neighbour_killed() or (held and self._first_back() is not None)

        self._until(done, most_s - time.monotonic())

    def _restore(self) -> None:
        """By hand, so that it happens while tokens are decoded and does not wait for the quiet time."""
        self._restore_began_s = time.monotonic()
        self._host.say("restore")
        try:
            self._until(lambda: bool(self._restored), _RESTORE_TIMEOUT_S)
            self._until(lambda: False, SETTLE_S)
        except ModelKilledError:
            return  # told by whoever next speaks to it

    def _until(self, done: Callable[[], bool], timeout_s: float) -> None:
        until_s = time.monotonic() + timeout_s
        while not done() and (left_s := until_s - time.monotonic()) > 0:
            for message in self._host.hear(min(_HEAR_S, left_s)):
                self._take_in(message)
            self._host.check_alive()

    def _take_in(self, message: messages.Message) -> None:
        if isinstance(message, messages.Token):
            self._tokens.append(message)
        elif isinstance(message, messages.Governed):
            event = message.event
            if isinstance(event, (Trimmed, Released)):
                self._back.append(event)
            elif isinstance(event, Restored) and self._restore_began_s:
                self._restored.append(event)

    def _first_back(self) -> Trimmed | Released | None:
        began = self._host.said_at("begin")
        if began is None:
            return None
        return next(
            (event for event in self._back if event.time_s >= began.time_s and event.bytes_returned), None
        )

    def _onset(self, entered_s: float, ended_s: float, killed: bool) -> Onset:
        began = self._host.said_at("begin")
        began_s = ended_s if began is None else began.time_s
        looks = [look for look in self._watch.looks if look.time_s <= ended_s]
        signal = first_signal(looks, began_s, STALL_US, self._line_bytes)
        back = [event for event in self._back if event.time_s >= began_s]
        first = self._first_back()
        trims = [event for event in back if isinstance(event, Trimmed)]
        fell = first_fall(looks, began_s) if self._options.swap == "none" else None
        polls = [poll_time(looks, began_s, self._options.avg10, poll_s) for poll_s in POLLS_S]
        return Onset(
            number=0,
            mode=self._mode,
            variant=self._variant,
            killed=killed,
            signal="" if signal is None else signal.what,
            signal_s=None if signal is None else signal.time_s - began_s,
            returned_s=None if first is None else first.time_s - began_s,
            fell_s=None if fell is None else fell - began_s,
            poll_s=[None if polled is None else polled - began_s for polled in polls],
            hold_s=ended_s - began_s,
            returned_bytes=sum(event.bytes_returned for event in back),
            trims=len(trims),
            reason=trims[0].reason if trims else "",
            restore_s=sum(event.seconds for event in self._restored) if self._restored else None,
            whole=False,
            near=self._near(began_s, ended_s, trims),
            watch_share=self._watch.busy_share(time.monotonic() - entered_s),
        )

    def _near(self, began_s: float, ended_s: float, trims: list[Trimmed]) -> Near:
        return near(
            self._tokens,
            [(event.time_s - event.seconds, event.time_s) for event in trims],
            [(event.time_s - event.seconds, event.time_s) for event in self._restored],
            (began_s, ended_s),
        )
