"""`psi-kv run`: a prompt in, text out while it is generated, and a line on what the governor did."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click
import msgspec

from psi_kv_governor.cli._group import example
from psi_kv_governor.cli.session import Tally, model_options, open_model
from psi_kv_governor.errors import BadInputError

if TYPE_CHECKING:
    from psi_kv_governor.llama import GovernedLlama


@click.command(
    "run",
    short_help="Answer a prompt on a governed model.",
    epilog=example(
        'psi-kv run "What is the capital of France?"',
        'psi-kv run --raw -n 64 "Once upon a time"',
        "psi-kv run --model model.gguf -c 32768 - < long-prompt.txt",
    ),
)
@click.argument("prompt")
@click.option(
    "-n", "--n-predict", type=click.IntRange(min=1), default=256, show_default=True, help="Most tokens."
)
@click.option("--raw", is_flag=True, help="Continue the prompt as it is, without the model's chat template.")
@model_options
def command(prompt: str, n_predict: int, raw: bool, as_json: bool, **options: Any) -> None:
    """Answer PROMPT (- reads it from standard input) on a governed model."""
    prompt = sys.stdin.read() if prompt == "-" else prompt
    if not prompt.strip():
        raise BadInputError("the prompt is empty: give a text, or - to read it from standard input")
    with open_model(options) as (llm, tally):
        answer = Answer()
        begin = time.monotonic()
        try:
            for text in answer.stream(llm, prompt, raw, n_predict, options["temp"]):
                if not as_json:
                    click.echo(text, nl=False)
        except ValueError as error:  # upstream: the prompt alone is longer than the context
            raise BadInputError(f"{error}: give a larger --ctx-size or a shorter prompt") from error
        finally:
            # Also when it is interrupted: what was generated so far is the user's.
            _finish(llm, tally, answer, time.monotonic() - begin, as_json)


class Answer:
    """A completion as it grows."""

    def __init__(self) -> None:
        self.text = ""
        self.chunks = 0
        self.marked: dict[str, int] = {}

    def stream(self, llm: GovernedLlama, prompt: str, raw: bool, most: int, temp: float) -> Iterator[str]:
        """Generate, token by token."""
        if raw:
            chunks = llm.create_completion(prompt, max_tokens=most, temperature=temp, stream=True)
        else:
            messages = [{"role": "user", "content": prompt}]
            chunks = llm.create_chat_completion(messages, max_tokens=most, temperature=temp, stream=True)
        yield from self.read(chunks)

    def read(self, chunks: Iterator[dict[str, Any]]) -> Iterator[str]:
        """The texts of a streamed completion, of either kind."""
        for chunk in chunks:
            choice = chunk["choices"][0]
            text = choice["text"] if "text" in choice else choice["delta"].get("content") or ""
            self.marked = chunk.get("psi_kv", self.marked)
            self.text += text
            self.chunks += bool(text)
            if text:
                yield text


def _finish(llm: GovernedLlama, tally: Tally, answer: Answer, seconds: float, as_json: bool) -> None:
    status = llm.governor.status()
    rate = answer.chunks / seconds if seconds else 0.0
    if as_json:
        report = {
            "text": answer.text,
            "tokens": answer.chunks,
            "seconds": round(seconds, 3),
            "trims": tally.trims,
            "bytes_returned": tally.bytes_returned,
            "restored_cells": tally.restored,
            "recomputed_cells": tally.recomputed,
            "masked_cells": status.masked_cells,
            "psi_kv": answer.marked or None,
            "status": status,
        }
        click.echo(msgspec.json.encode(report).decode())
        return
    click.echo()
    click.echo(f"psi-kv: {answer.chunks} tokens at {rate:.1f}/s; {tally.words(status)}", err=True)
    if answer.marked:
        click.echo(f"psi-kv: {without(answer.marked)}", err=True)


def without(marked: dict[str, int]) -> str:
    """What an answer was computed without, in one clause."""
    gone = f", {marked['lost_tokens']} were gone for good" if marked.get("lost_tokens") else ""
    return (
        f"{marked['masked_tokens']} tokens of the context were masked{gone} while it answered, and "
        f"{marked['affected_tokens']} were decoded without them"
    )
