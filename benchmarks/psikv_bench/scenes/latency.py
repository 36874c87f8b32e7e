"""From the first sign of need to the bytes returned: onset after onset beside one model."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Annotated, Literal, NamedTuple

import msgspec
from msgspec import Meta

from psi_kv_governor.config import load_config
from psi_kv_governor.errors import BadInputError
from psi_kv_governor.events import Restored, Trimmed
from psikv_bench import reaction_report
from psikv_bench.host import ModelKilledError
from psikv_bench.messages import Variant, is_governed
from psikv_bench.options import each_once
from psikv_bench.reaction_report import POLL_S, Reaction
from psikv_bench.record import Recorder, Report, flat
from psikv_bench.scene import Scene
from psikv_bench.trials import series
from psikv_bench.trials.serving import Onset, Serving
from psikv_bench.trials.sizing import Sizes, TrialOptions, mild, prepared, require_sandbox
from psikv_bench.worker import Worker

Mode = Literal["decode", "prefill", "idle"]

CALM_S = 1.0
"""Decoded in peace first: what the jitter is held against."""
SETTLE_S = 0.5
"""Decoded after a restore."""
LIFTED_BUDGET_PER_MIN = 1e6
"""Hundreds of onsets an hour are the very attack that the budget is a guard against; here it would only
make later onsets wait for the minute to pass."""
STALL_US = 10_000
"""Of `some` since the neighbour's first byte: the first sign of need. A calm cgroup has a tenth of it."""
PROMPT_TOKENS = 1024
"""Of the prompt that is decoded again and again."""
_LOOK_S = 0.003
_RESTORE_TIMEOUT_S = 60.0
_CALM_TIMEOUT_S = 45.0
_CALM_SHARE = 0.2
"""Of the poller's threshold, to which avg10 has to fall before the next onset. It falls from 60 % to 2 % in
35 s; without the wait, the last onset's pressure would pass for an early alarm."""


class LatencyOptions(TrialOptions, frozen=True, kw_only=True):
    """What is asked for."""

    ctx: Annotated[int, Meta(ge=1, description="Tokens in the context.")] = 4096
    onsets: Annotated[int, Meta(ge=1, description="Of each mode.")] = 100
    control: Annotated[int, Meta(ge=0, description="Of each mode besides, beside an ungoverned model.")] = 10
    variant: Annotated[Variant, Meta(description="Which of the governed ones.")] = "psi"
    modes: Annotated[tuple[Mode, ...], Meta(description="What the model does meanwhile.")] = (
        "decode", "prefill", "idle",
    )  # fmt: skip
    rate: Annotated[float, Meta(ge=0, description="The neighbour's, MB/s; 0: as fast as it can.")] = 100.0
    hold_max_s: Annotated[float, Meta(ge=0, description="And at most, until bytes are back.")] = 20.0
    avg10: Annotated[float, Meta(gt=0, le=1, description="Threshold of the poller beside it, 0 to 1.")] = 0.1

    def check(self) -> None:
        each_once("modes", self.modes)
        if self.hold_max_s < self.hold_s:
            raise BadInputError(f"--hold-max-s {self.hold_max_s} is not usable: give --hold-s or more")
        if not is_governed(self.variant):
            raise BadInputError(f"--variant {self.variant} is not usable: give one that is governed")


class _What(NamedTuple):
    number: int
    mode: Mode
    variant: Variant


def run(recorder: Recorder[LatencyOptions]) -> Report:
    """Run what is not yet in the journal, and report. Ctrl-C keeps the finished onsets."""
    asked = recorder.options
    require_sandbox(asked.swap)
    journal = recorder.journal(Reaction, msgspec.structs.replace(asked, model="", onsets=1))
    setup = asked.setup(
        prompt_tokens=PROMPT_TOKENS if "prefill" in asked.modes else 0,
        settings={"budget_per_min": LIFTED_BUDGET_PER_MIN},
    )
    with prepared(setup, recorder.say) as (ready, need):
        sizes = mild(need, load_config(), *asked.given_bytes)
        with closing(Serving(ready, need, sizes, asked.swap, recorder.say)) as serving:

            def one(what: _What) -> Reaction:
                said = f"{what.mode}, {what.variant}: onset {what.number} of {asked.onsets}"
                recorder.say(said, new=True)
                return _run(serving, sizes, asked, what)

            journal.play(list(_order(asked))[len(journal.parts) :], one)
    reactions: list[Reaction] = journal.parts
    report = recorder.report(
        list(reaction_report.figures(reactions)),
        [asked.threads or 1],
        options={"sizes": sizes, "need": need},
        interrupted=journal.interrupted,
        tables=reaction_report.tables(reactions),
        notes=reaction_report.notes(reactions, asked.avg10, asked.hold_max_s),
        rows=flat(reactions),
    )
    return recorder.save(report, report.rows)


def _order(asked: LatencyOptions) -> Iterator[_What]:
    """The modes by turns, and the ungoverned onsets first: more onsets can be added at the end."""
    parts: list[tuple[int, Variant]] = [(asked.control, "fixed"), (asked.onsets, asked.variant)]
    for count, variant in parts:
        for number in range(1, count + 1):
            yield from (_What(number, mode, variant) for mode in asked.modes)


def _run(serving: Serving, sizes: Sizes, asked: LatencyOptions, what: _What) -> Reaction:
    """One onset, and back to a calm and whole context. Raises PsiKvError where the model can't be run."""
    host = serving.ready(what.variant)
    onset, entered_s = Onset(host, serving, _LOOK_S), time.monotonic()
    with onset.watcher:
        restored_from_s = _play(onset, what, sizes, asked)
        killed = onset.killed or onset.neighbour_killed
        busy = onset.watcher.busy_share(time.monotonic() - entered_s)
        whole = not killed and not serving.make_whole(host) and _calm(onset, asked.avg10 * _CALM_SHARE)
    if not whole:
        killed = serving.give_up(host) or killed  # also while its context came back
    began_s, ended_s, back = onset.began_s, onset.ended_s, onset.back()
    looks = [look for look in onset.watcher.looks if look.time_s <= ended_s]
    line_bytes = load_config().headroom_low * sizes.limit_bytes
    sign = series.first_signal(looks, began_s, STALL_US, line_bytes)

    def since(time_s: float | None) -> float | None:
        return None if time_s is None else time_s - began_s

    return Reaction(
        number=what.number,
        mode=what.mode,
        variant=what.variant,
        killed=killed,
        signal="" if sign is None else sign.what,
        signal_s=since(sign and sign.time_s),
        returned_s=since(back[0].time_s if back else None),
        polled_s=since(series.poll_time(looks, began_s, asked.avg10, POLL_S)),
        returned_bytes=sum(event.bytes_returned for event in back),
        whole=whole,
        near=series.near(
            onset.tokens,
            [series.span(event) for event in back if isinstance(event, Trimmed)],
            [series.span(event) for event in _restored(onset, restored_from_s)],
            (began_s, ended_s),
        ),
        watch_share=busy,
    )


def _play(onset: Onset, what: _What, sizes: Sizes, asked: LatencyOptions) -> float:
    """Calm, the neighbour, the hold, and the restore while the mode goes on. Gives when that began."""
    if what.mode != "idle":
        onset.host.order(Worker.decode_on if what.mode == "decode" else Worker.prefill)
    onset.listen(CALM_S)
    onset.press(sizes.load_bytes, asked.rate, asked.hold_s, asked.hold_max_s, lambda: bool(onset.back()))
    began_s = time.monotonic()
    # What was idle is parked and not masked: it comes back when it is used, and nobody says so.
    if is_governed(what.variant) and what.mode != "idle" and not (onset.killed or onset.neighbour_killed):
        # On order, so that it happens while tokens are decoded and does not wait for the quiet time.
        onset.host.order(Worker.restore)
        if _listened(onset, _RESTORE_TIMEOUT_S, lambda: bool(_restored(onset, began_s))):
            _listened(onset, SETTLE_S)
    return began_s


def _listened(onset: Onset, seconds: float, is_over: Callable[[], bool] = lambda: False) -> bool:
    """Listen; whether the model is still there. That it is not is said by whoever next speaks to it."""
    try:
        onset.listen(seconds, is_over)
    except ModelKilledError:
        return False
    return True


def _restored(onset: Onset, since_s: float) -> list[Restored]:
    events = (message.event for message in onset.events)
    return [event for event in events if isinstance(event, Restored) and event.time_s >= since_s]


def _calm(onset: Onset, floor: float) -> bool:
    """Wait until avg10 has fallen; whether the model is still there."""

    def fallen() -> bool:
        last = onset.watcher.looks[-1].inside
        return last is None or last.avg10 <= floor

    return _listened(onset, _CALM_TIMEOUT_S, fallen)


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
