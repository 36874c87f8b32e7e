"""From the first sign of need to the bytes returned: onset after onset beside one model."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from psi_kv_governor.config import GovernorConfig, load_config
from psi_kv_governor.errors import BadInputError, PsiKvError
from psi_kv_governor.events import Restored, Trimmed
from psi_kv_governor.sandbox import messages
from psi_kv_governor.sandbox.host import MIB, Host, ModelKilledError
from psi_kv_governor.sandbox.llm import is_governed
from psi_kv_governor.sandbox.messages import Setup, Variant
from psi_kv_governor.sandbox.sandbox import Swap
from psikv_bench import reaction_report
from psikv_bench.options import Options, each_once
from psikv_bench.reaction_report import POLLS_S, Reaction
from psikv_bench.record import Recorder, Report
from psikv_bench.scene import Scene
from psikv_bench.trials import series
from psikv_bench.trials.serving import SPARE_TOKENS, Onset, Place, Serving
from psikv_bench.trials.sizing import Sizes, mild, prepared, require_sandbox

Mode = Literal["decode", "prefill", "idle"]

CALM_S = 1.0
"""Decoded in peace first: what the jitter is held against."""
SETTLE_S = 0.5
"""Decoded after a restore."""
LIFTED_BUDGET_PER_MIN = 1e6
"""Hundreds of onsets an hour are the very attack that the budget is a guard against; here it would only
make later onsets wait for the minute to pass."""
SWAP_BYTES = 512 * MIB
STALL_US = 10_000
"""Of `some` since the neighbour's first byte: the first sign of need. A calm cgroup has a tenth of it."""
_LOOK_S = 0.003
_RESTORE_TIMEOUT_S = 60.0
_CALM_TIMEOUT_S = 45.0
_CALM_SHARE = 0.2
"""Of the poller's threshold, to which avg10 has to fall before the next onset. It falls from 60 % to 2 % in
35 s; without the wait, the last onset's pressure would pass for an early alarm."""


class LatencyOptions(Options, frozen=True, kw_only=True):
    """What is asked for. None: worked out from what the model takes."""

    onsets: Annotated[int, Meta(ge=1, description="Of each mode.")] = 100
    control: Annotated[
        int, Meta(ge=0, description="Onsets of each mode beside an ungoverned model, besides.")
    ] = 10
    variant: Annotated[Variant, Meta(description="Which of the governed ones.")] = "psi"
    modes: Annotated[tuple[Mode, ...], Meta(description="What the model does meanwhile.")] = (
        "decode", "prefill", "idle",
    )  # fmt: skip
    rate: Annotated[
        float, Meta(ge=0, description="MB/s at which the neighbour takes memory; 0: as fast as it can.")
    ] = 100.0
    ctx: Annotated[int, Meta(ge=1, description="Tokens in the context.")] = 4096
    limit_mib: Annotated[int, Meta(ge=1, description="Of the cgroup [from what the model takes].")] | None = (
        None
    )
    load_mib: (
        Annotated[int, Meta(ge=1, description="What the neighbour takes [half of what may go must go].")]
        | None
    ) = None
    hold_s: Annotated[float, Meta(ge=0, description="How long the load is held at least.")] = 2.0
    hold_max_s: Annotated[float, Meta(ge=0, description="And at most, until bytes are back.")] = 20.0
    avg10: Annotated[
        float, Meta(gt=0, le=1, description="Threshold of the poller it is compared with, 0 to 1.")
    ] = 0.10
    prompt: Annotated[int, Meta(ge=1, description="Tokens of the prompt that is decoded over and over.")] = (
        1024
    )
    swap: Annotated[Swap, Meta(description="Inside of the cgroup.")] = "none"

    def check(self) -> None:
        each_once("modes", self.modes)
        if self.hold_max_s < self.hold_s:
            raise BadInputError(f"--hold-max-s {self.hold_max_s} is not usable: give --hold-s or more")
        if not is_governed(self.variant):
            raise BadInputError(f"--variant {self.variant} is not usable: give one that is governed")


def run(recorder: Recorder[LatencyOptions]) -> Report:
    """Run what is not yet in the journal, and report. Ctrl-C keeps the finished onsets."""
    asked = recorder.options
    require_sandbox(asked.swap)
    journal = recorder.journal(Reaction, msgspec.structs.replace(asked, model="", onsets=1))
    setup = Setup(
        variant="fixed",
        model=asked.model,
        context_tokens=asked.ctx,
        decoded_tokens=SPARE_TOKENS,
        prompt_tokens=asked.prompt if "prefill" in asked.modes else 0,
        threads=asked.threads or 1,
        settings={"budget_per_min": LIFTED_BUDGET_PER_MIN},
    )
    config = load_config()
    limit, load = (None if mib is None else mib * MIB for mib in (asked.limit_mib, asked.load_mib))
    interrupted = False
    with prepared(setup, recorder.say) as (ready, need):
        sizes = mild(need, config, limit, load)
        with Serving(ready, need, Place(sizes, asked.swap, SWAP_BYTES), recorder.say) as serving:
            try:
                for number, mode, variant in list(_order(asked))[len(journal.parts) :]:
                    recorder.say(f"{mode}, {variant}: onset {number} of {asked.onsets}", new=True)
                    journal.add(_run(serving, sizes, asked, config, (number, mode, variant)))
            except KeyboardInterrupt:
                interrupted = True
    reactions: list[Reaction] = journal.parts
    if not reactions:
        raise PsiKvError("interrupted before the first onset was finished: there is nothing to report")
    report = recorder.report(
        list(reaction_report.figures(reactions)),
        [asked.threads or 1],
        options={"sizes": sizes, "need": need},
        interrupted=interrupted,
        tables=reaction_report.tables(reactions),
        notes=reaction_report.notes(reactions, asked.avg10, asked.hold_max_s),
        rows=reaction_report.records(reactions),
    )
    return recorder.save(
        report, reaction_report.records(reactions), lambda folder: reaction_report.plot(folder, reactions)
    )


def _order(asked: LatencyOptions) -> Iterator[tuple[int, Mode, Variant]]:
    """The modes by turns, and the ungoverned onsets first: more onsets can be added at the end."""
    for number in range(1, asked.control + 1):
        yield from ((number, mode, "fixed") for mode in asked.modes)
    for number in range(1, asked.onsets + 1):
        yield from ((number, mode, asked.variant) for mode in asked.modes)


def _run(
    serving: Serving,
    sizes: Sizes,
    asked: LatencyOptions,
    config: GovernorConfig,
    what: tuple[int, Mode, Variant],
) -> Reaction:
    """One onset, and back to a calm and whole context. Raises PsiKvError where the model can't be run."""
    number, mode, variant = what
    host, _ = serving.ready(variant)
    entered_s = time.monotonic()
    with Onset(host, serving, _LOOK_S) as onset:
        restored_from_s = _play(onset, mode, is_governed(variant), sizes, asked)
        killed = onset.killed or onset.neighbour_killed
        busy = onset.watcher.busy_share(time.monotonic() - entered_s)
        whole = not killed and not serving.make_whole(host) and _calm(onset, asked.avg10 * _CALM_SHARE)
    if not whole:
        killed = serving.give_up(host) or killed  # also while its context came back
    line_bytes = config.headroom_low * sizes.limit_bytes
    found = _reaction(onset, asked, line_bytes, restored_from_s)
    return msgspec.structs.replace(
        found, number=number, mode=mode, variant=variant, whole=whole, killed=killed, watch_share=busy
    )


def _play(onset: Onset, mode: Mode, governed: bool, sizes: Sizes, asked: LatencyOptions) -> float:
    """Calm, the neighbour, the hold, and the restore while the mode goes on. Gives when that began."""
    if mode != "idle":
        onset.host.order(messages.Decode() if mode == "decode" else messages.Prefill())
    onset.listen(CALM_S)

    def is_over() -> bool:
        held = onset.host.said_at("taken") is not None and onset.held_s() >= asked.hold_s
        return held and bool(onset.back())

    onset.press(sizes.load_bytes, asked.rate, is_over, asked.hold_max_s)
    began_s = time.monotonic()
    # What was idle is parked and not masked: it comes back when it is used, and nobody says so.
    if governed and mode != "idle" and not (onset.killed or onset.neighbour_killed):
        _restore(onset.host, onset, began_s)
    return began_s


def _restore(host: Host, onset: Onset, began_s: float) -> None:
    """On order, so that it happens while tokens are decoded and does not wait for the quiet time."""
    host.order(messages.Restore())
    try:
        onset.listen(_RESTORE_TIMEOUT_S, lambda: bool(_restored(onset, began_s)))
        onset.listen(SETTLE_S)
    except ModelKilledError:
        return  # said by whoever next speaks to it


def _restored(onset: Onset, since_s: float) -> list[Restored]:
    events = (message.event for message in onset.events)
    return [event for event in events if isinstance(event, Restored) and event.time_s >= since_s]


def _calm(onset: Onset, floor: float) -> bool:
    """Wait until avg10 has fallen; whether the model is still there."""

    def fallen() -> bool:
        last = onset.watcher.looks[-1].inside
        return last is None or last.avg10 <= floor

    try:
        onset.listen(_CALM_TIMEOUT_S, fallen)
    except ModelKilledError:
        return False
    return True


def _reaction(onset: Onset, asked: LatencyOptions, line_bytes: float, restored_from_s: float) -> Reaction:
    began_s, ended_s = onset.began_s, onset.ended_s
    looks = [look for look in onset.watcher.looks if look.time_s <= ended_s]
    signal = series.first_signal(looks, began_s, STALL_US, line_bytes)
    back = onset.back()
    trims = [event for event in back if isinstance(event, Trimmed)]
    restored = _restored(onset, restored_from_s)
    fell = series.first_fall(looks, began_s) if asked.swap == "none" else None
    polls = [series.poll_time(looks, began_s, asked.avg10, poll_s) for poll_s in POLLS_S]
    return Reaction(
        number=0,
        mode="decode",
        variant="fixed",
        killed=False,
        signal="" if signal is None else signal.what,
        signal_s=None if signal is None else signal.time_s - began_s,
        returned_s=back[0].time_s - began_s if back else None,
        fell_s=None if fell is None else fell - began_s,
        poll_s=[None if polled is None else polled - began_s for polled in polls],
        hold_s=ended_s - began_s,
        returned_bytes=sum(event.bytes_returned for event in back),
        trims=len(trims),
        reason=trims[0].reason if trims else "",
        restore_s=sum(event.seconds for event in restored) if restored else None,
        whole=False,
        near=series.near(
            onset.tokens,
            [(event.time_s - event.seconds, event.time_s) for event in trims],
            [(event.time_s - event.seconds, event.time_s) for event in restored],
            (began_s, ended_s),
        ),
        watch_share=0.0,
    )


SCENE = Scene(
    about="""Onset after onset of a neighbour beside one model: how fast bytes are back, what it costs tokens.

    Next to what polling avg10 would have taken on the same onsets.
    """,
    options=LatencyOptions(),
    quick=LatencyOptions(ctx=1536, onsets=3, control=1, hold_s=1.0, hold_max_s=5.0),
    run=run,
    examples=(
        "psi-kv bench latency --quick",
        "psi-kv bench latency --onsets 100 --out-dir latency",
        "psi-kv bench latency --modes decode --rate 200",
    ),
)
