"""The model under test: one context, read once, from which every policy gives up in turn."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from psi_kv_governor.cache import Recall
from psi_kv_governor.errors import BadInputError, PsiKvError
from psi_kv_governor.policy import Policy, Range
from psi_kv_governor.sandbox import llm as llms
from psi_kv_governor.sandbox.messages import Setup
from psikv_bench.fidelity.contenders import RECALL, Contender, needs
from psikv_bench.model import Context, Logits


@dataclass(frozen=True)
class Mark:
    """A place in the context to come back to."""

    n_tokens: int
    sampled: Any
    """What had been sampled of the attention by then."""


class Subject(Context):
    """A governed model whose context is read once and then trimmed, asked and restored again and again.

    What a policy does not decide is the same for all: the cells given up (whole blocks), the tokens before
    and after, and the attention that was sampled on the way.

    Raises BadInputError where the cache can't serve one of the policies, or the context is too long for the
    model; PsiKvError where the model can't give up a range at all.
    """

    def __init__(self, setup: Setup, compared: Sequence[Contender], n_ctx: int) -> None:
        llms.llama_class(setup.variant)  # the agent has to be there before llama_cpp
        _check_length(Path(setup.model), n_ctx)
        super().__init__(setup, n_ctx)
        self.n_ctx = n_ctx
        self._ids: list[int] = []
        self._recalls = False
        try:
            for one in compared:
                self.check_served(one.policies[0])
            self.collect(needs(compared))
        except BaseException:
            self.close()
            raise

    # -- reading ----------------------------------------------------------------------------------------

    def tokens(self, text: str) -> list[int]:
        """The tokens of `text`, with nothing put before them; a chat template's own are known."""
        found: list[int] = self.llm.tokenize(text.encode(), add_bos=False, special=True)
        return found

    @property
    def opening(self) -> list[int]:
        """What this model wants at the start of a text: its BOS token, or nothing."""
        found: list[int] = self.llm.tokenize(b"", add_bos=True)
        return found

    @property
    def template(self) -> str | None:
        """The model's chat template, in Jinja; None where it brings none."""
        found: str | None = self.llm.metadata.get("tokenizer.chat_template")
        return found

    def forget(self) -> None:
        """Empty the context."""
        self.cut(0)

    def load(self, tokens: Sequence[int]) -> None:
        """Have `tokens` as the context, by reading on where they begin with what is in it already."""
        if self._ids != list(tokens[: self.n_tokens]):
            self.forget()
        self.read(tokens[self.n_tokens :])

    def read(self, tokens: Sequence[int]) -> None:
        """Decode `tokens` after the context."""
        super().read(tokens)
        self._ids += tokens

    def logits(self, tokens: Sequence[int]) -> Logits:
        """Decode `tokens` (at most a batch) after the context; gives the logits after each.

        With recall one by one, as an answer is: a batch would call at once for what each of them needs.
        """
        parts = [[token] for token in tokens] if self._recalls else [tokens]
        found = np.concatenate([super(Subject, self).logits(part) for part in parts])
        self._ids += tokens
        return found

    def asked(self, question: Sequence[int], answer: Sequence[int]) -> Logits:
        """Decode a prompt's end and what follows it; gives the logits after each token. With recall those
        within the question are NaN: a prompt has only those after its last."""
        if not self._recalls:
            return self.logits([*question, *answer])
        self.read(question)
        found = np.full((len(question), self.llm.n_vocab()), np.nan, np.float32)
        found[-1] = np.ctypeslib.as_array(self.llm._ctx.get_logits(), shape=(self.llm.n_vocab(),))
        return np.concatenate([found, self.logits(answer)]) if len(answer) else found

    def greedy(self, token: int, count: int) -> list[int]:
        """The `count` most probable tokens in turn, after `token` was decoded."""
        answer: list[int] = []
        for _ in range(count):
            token = int(self.logits([token])[-1].argmax())
            answer.append(token)
        return answer

    # -- going back -------------------------------------------------------------------------------------

    def mark(self) -> Mark:
        """The present end of the context."""
        return Mark(self.n_tokens, self.sampled())

    def back_to(self, mark: Mark) -> None:
        """Forget all that came after `mark`. What was given up since stays away until it is restored."""
        self.cut(mark.n_tokens)
        self.forget_sampled(mark.sampled)

    def cut(self, length: int) -> None:
        """Forget all but the first `length` tokens."""
        super().cut(length)
        del self._ids[length:]

    # -- giving up --------------------------------------------------------------------------------------

    def trim(self, policy: Policy, cells: int) -> None:
        """Give up the `cells` cells that `policy` chooses. Raises PsiKvError where it gave up others."""
        ranges = self.chosen(policy, cells)
        if (given := sum(part.cells for part in ranges)) != cells:
            raise PsiKvError(f"{policy.name} chose {given} of {cells} cells")
        self.mask(ranges)

    def trim_cell(self, position: int) -> None:
        """Give up one cell."""
        self.mask([Range(position, position + 1)])

    @contextmanager
    def trimmed(self, policy: Policy, share: float) -> Iterator[None]:
        """Without `share` of the context, as `policy` chooses; whole again, and no longer, afterwards."""
        mark = self.mark()
        with self.recalling(policy):
            try:
                self.trim(policy, self.cells(share))
                yield
            finally:
                self.back_to(mark)
                self.unmask()

    @contextmanager
    def recalling(self, policy: Policy) -> Iterator[None]:
        """With recall, where `policy` is the contender that has it; without it afterwards."""
        settings = Recall(
            mode="ahead",
            sink_cells=self.config.sink_cells,
            window_cells=self.config.window_cells,
            bytes_per_s=self.config.recall_bytes_per_s,
        )
        self._recalls = policy.name == RECALL
        self.engine.recall(settings if self._recalls else Recall())
        try:
            yield
        finally:
            self.engine.recall(Recall())
            self._recalls = False

    def cells(self, share: float) -> int:
        """`share` of the context in whole blocks, so that every policy gives up the same number of cells."""
        block = self.config.block_cells
        return round(share * self.n_tokens / block) * block


def _check_length(model: Path, n_ctx: int) -> None:
    """Before a context is made of it: llama.cpp would only warn. Raises BadInputError."""
    from llama_cpp import _internals, llama_model_default_params
    from llama_cpp._logger import set_verbose

    set_verbose(False)
    params = llama_model_default_params()
    params.vocab_only = True
    head = _internals.LlamaModel(path_model=str(model), params=params, verbose=False)
    try:
        said = head.metadata()
    finally:
        head.close()
    trained = int(said.get(f"{said.get('general.architecture')}.context_length", n_ctx))
    if n_ctx > trained:
        raise BadInputError(f"a context of {n_ctx} tokens is beyond this model's {trained}: say less (--ctx)")
