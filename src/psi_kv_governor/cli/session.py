"""What `run` and `chat` share: opening the model, ending cleanly on a signal, and the summary line."""

from __future__ import annotations

import logging
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console

from psi_kv_governor.config import load_config
from psi_kv_governor.errors import PsiKvError
from psi_kv_governor.events import Event, JsonLinesSink, Recomputed, Restored, Trimmed
from psi_kv_governor.model import demo_model_path
from psi_kv_governor.recording import Recorder
from psi_kv_governor.status import Status

if TYPE_CHECKING:
    from psi_kv_governor.llama import GovernedLlama

_OPTIONS = (
    click.option("-m", "--model", type=click.Path(path_type=Path), help="GGUF file [default: demo model]."),
    click.option(
        "-c", "--ctx-size", type=click.IntRange(min=0), default=4096, show_default=True,
        help="Cells of the KV cache; 0: as many as the model was trained for.",
    ),
    click.option("-t", "--threads", type=click.IntRange(min=1), help="Threads [default: half the cores]."),
    click.option(
        "--flash/--no-flash", default=True, show_default=True,
        help="Flash attention: with it cells of the running conversation can be given up too.",
    ),
    click.option("--temp", type=click.FloatRange(min=0), default=0.7, show_default=True, help="Temperature."),
    click.option("--seed", type=click.IntRange(min=0), help="Seed of the sampling [default: random]."),
    click.option(
        "--config", "config_file", type=click.Path(path_type=Path),
        help="Settings [default: ./psi-kv.toml where there is one].",
    ),
    click.option("--policy", help="Which tokens go first; see `psi-kv policies` [default: hybrid]."),
    click.option("--events", type=click.Path(path_type=Path), help="Append events to this file (JSONL)."),
    click.option(
        "--record", type=click.Path(path_type=Path),
        help="Write every turn of the governor to this new file, for `psi-kv replay`.",
    ),
    click.option("--json", "as_json", is_flag=True, help="JSON instead of text."),
    click.option("-v", "--verbose", is_flag=True, help="Show llama.cpp's own log."),
)  # fmt: skip


class TerminatedError(PsiKvError):
    """SIGTERM came: end as an interrupted program does."""

    exit_status = 128 + signal.SIGTERM


def model_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options of every command that opens a model."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


class Tally:
    """Counts what the governor did, for the summary."""

    def __init__(self) -> None:
        self.trims = self.given_up = self.bytes_returned = self.restored = self.recomputed = 0

    def __call__(self, event: Event) -> None:
        if isinstance(event, Trimmed):
            self.trims += 1
            self.given_up += event.cells
            self.bytes_returned += event.bytes_returned
        elif isinstance(event, Restored):
            self.restored += event.cells
        elif isinstance(event, Recomputed):
            self.recomputed += event.cells

    def words(self, status: Status) -> str:
        """One clause: what was given up, and what of it is back."""
        if not self.trims:
            return "the machine was calm, nothing was given up"
        back = f"{self.restored} restored" + (f", {self.recomputed} recomputed" if self.recomputed else "")
        return (
            f"{self.trims} trim{'s' if self.trims > 1 else ''} gave up {self.given_up} cells and returned "
            f"{self.bytes_returned / 2**20:.1f} MiB; {back}, {status.masked_cells} masked"
        )


@contextmanager
def open_model(options: dict[str, Any]) -> Iterator[tuple[GovernedLlama, Tally]]:
    """The governed model of the command's options, closed at the end; SIGTERM ends it like Ctrl-C.

    Raises BadInputError for a model or setting that can't be used, PsiKvError without llama-cpp-python.
    """
    logging.basicConfig(format="psi-kv: %(message)s", level=logging.WARNING, stream=sys.stderr)
    overrides = {"policy": options["policy"]} if options["policy"] else {}
    config = load_config(options["config_file"], default_file=True, **overrides)
    path = options["model"] or demo_model_path()
    with ExitStack() as files:
        sink = files.enter_context(closing(JsonLinesSink(options["events"]))) if options["events"] else None
        recorder = (
            files.enter_context(closing(Recorder(options["record"], config))) if options["record"] else None
        )
        from psi_kv_governor.llama import GovernedLlama

        with Console(stderr=True).status(f"opening {path.name}"):
            llm = GovernedLlama(
                str(path),
                config=config,
                auto=False,
                n_ctx=options["ctx_size"],
                n_threads=options["threads"],
                flash_attn=options["flash"],
                **({"seed": options["seed"]} if options["seed"] is not None else {}),
                verbose=options["verbose"],
            )
        tally = Tally()
        llm.governor.subscribe(tally)
        if sink:
            llm.governor.subscribe(sink)
        if recorder:
            llm.governor.observe(recorder)
        try:
            with ended_by_sigterm():
                llm.governor.start()  # not before: a recording begins with the first turn
                yield llm, tally
        finally:
            llm.close()


@contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """Have SIGTERM end what runs inside in order, as Ctrl-C does. Only in the main thread."""
    before = signal.signal(signal.SIGTERM, _terminated)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _terminated(number: int, frame: FrameType | None) -> None:
    raise TerminatedError("terminated")
