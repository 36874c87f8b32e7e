"""`psi-kv chat`: a conversation with a governed model in the terminal."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import click
import msgspec

from psi_kv_governor.cli._group import example
from psi_kv_governor.cli.run import Answer, without
from psi_kv_governor.cli.session import Tally, model_options, open_model
from psi_kv_governor.errors import PsiKvError

if TYPE_CHECKING:
    from psi_kv_governor.llama import GovernedLlama

_HELP = """\
/status           mode, stall, headroom and cells
/trim [SHARE]     give up a share of the cells now (0.5)
/restore          bring back what is masked
/heal             decode again what was answered meanwhile
/reset            forget the conversation
/undo             take back the last question and its answer
/quit             end (also Ctrl-D)"""


@click.command(
    "chat",
    short_help="Talk to a governed model.",
    epilog=example(
        "psi-kv chat", 'psi-kv chat --model model.gguf -c 32768 --system "Answer in one sentence."'
    ),
)
@click.option("--system", help="A system prompt.")
@click.option(
    "-n", "--n-predict", type=click.IntRange(min=1), default=512, show_default=True, help="Most tokens."
)
@model_options
def command(system: str | None, n_predict: int, as_json: bool, **options: Any) -> None:
    """Talk to a governed model; /help lists the commands of the conversation.

    With standard input from a file, each line is a question.
    """
    with open_model(options) as (llm, tally):
        talk = _Conversation(llm, tally, system=system, most=n_predict, temp=options["temp"], as_json=as_json)
        talk.run()
        if not as_json:
            click.echo(f"psi-kv: {tally.words(llm.governor.status())}", err=True)


class _Conversation:
    def __init__(
        self, llm: GovernedLlama, tally: Tally, *, system: str | None, most: int, temp: float, as_json: bool
    ) -> None:
        self._llm = llm
        self._tally = tally
        self._start = [{"role": "system", "content": system}] if system else []
        self._messages: list[dict[str, str]] = list(self._start)
        self._most = most
        self._temp = temp
        self._as_json = as_json

    def run(self) -> None:
        interactive = sys.stdin.isatty()
        if interactive:
            import readline  # noqa: F401  # line editing and history for input()

            click.echo("/help lists the commands, /quit ends.", err=True)
        while True:
            try:
                line = input("> " if interactive else "").strip()
            except EOFError:
                return
            if line == "/quit":
                return
            if line.startswith("/"):
                self._command(line)
            elif line:
                self._answer(line)

    def _answer(self, question: str) -> None:
        answer = Answer()
        messages = [*self._messages, {"role": "user", "content": question}]
        try:
            chunks = self._llm.create_chat_completion(
                messages, max_tokens=self._most, temperature=self._temp, stream=True
            )
            for text in answer.read(chunks):
                if not self._as_json:
                    click.echo(text, nl=False)
        except KeyboardInterrupt:
            # Ctrl-C ends this answer, not the conversation; what was said stays said.
            click.echo(" (interrupted)", err=True)
        except ValueError as error:  # upstream: the conversation is longer than the context
            click.echo(f"psi-kv: {error}: /undo or /reset makes room, or a larger --ctx-size", err=True)
            return
        self._messages = [*messages, {"role": "assistant", "content": answer.text}]
        if self._as_json:
            report = {"text": answer.text, "psi_kv": answer.marked or None}
            click.echo(msgspec.json.encode(report).decode())
            return
        click.echo()
        if answer.marked:
            click.echo(f"psi-kv: {without(answer.marked)}", err=True)

    def _command(self, line: str) -> None:
        name, _, argument = line.partition(" ")
        governor = self._llm.governor
        try:
            if name == "/status":
                click.echo(msgspec.json.format(msgspec.json.encode(governor.status())).decode(), err=True)
            elif name == "/trim":
                result = governor.trim(_share(argument or "0.5"))
                told = (
                    f"{result.cells} cells ({result.masked} masked), {result.bytes_returned / 2**20:.1f} MiB"
                )
                click.echo(result.problem or f"{told}, {result.seconds:.3f} s", err=True)
            elif name == "/restore":
                back = governor.restore()
                told = f"{back.cells} cells, {back.bytes_back / 2**20:.1f} MiB in {back.seconds:.3f} s"
                click.echo(back.problem or told, err=True)
            elif name == "/heal":
                click.echo(f"{self._llm.heal()} tokens decoded again", err=True)
            elif name == "/reset":
                self._messages = list(self._start)
            elif name == "/undo":
                self._messages = self._messages[: max(len(self._start), len(self._messages) - 2)]
            else:
                click.echo(_HELP, err=True)
        except PsiKvError as error:
            click.echo(f"psi-kv: {error}", err=True)


def _share(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return float("nan")  # which trim refuses by name
