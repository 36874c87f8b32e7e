"""The model under test: one context, read once, from which every policy gives up in turn."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from gguf import GGUFReader

from psi_kv_governor.cache import Recall, RecallMode
from psi_kv_governor.config import GovernorConfig
from psi_kv_governor.errors import BadInputError, PsiKvError
from psi_kv_governor.policy import Policy
from psi_kv_governor.sandbox.llm import logits_of
from psikv_bench.fidelity.contenders import RECALL
from psikv_bench.fidelity.texts import read_text
from psikv_bench.messages import Setup
from psikv_bench.model import Context, Logits


@dataclass(frozen=True)
class Mark:
    """A place in the context to come back to."""

    n_tokens: int
    sampled: bytes
    """What had been sampled of the attention by then."""


class Subject(Context):
    """A governed model whose context is read once and then trimmed, asked and restored again and again.

    What a policy does not decide is the same for all: the cells given up (whole blocks), the tokens before
    and after, and the attention that was sampled on the way.

    Raises BadInputError where the cache can't serve one of the policies, or the context is too long for the
    model; PsiKvError where the model can't give up a range at all.
    """

    def __init__(self, setup: Setup, compared: Sequence[Policy], n_ctx: int) -> None:
        _check_length(Path(setup.model), n_ctx)
        super().__init__(setup, n_ctx)
        self.n_ctx = n_ctx
        self._ids: list[int] = []
        self._recalls = False
        try:
            for policy in compared:
                self.check_served(policy)
            self.engine.collect(frozenset(kind for policy in compared for kind in policy.needs))
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

    def text(self, name: str) -> list[int]:
        """The tokens of the text called `name`, from the opening on."""
        return self.opening + self.tokens(read_text(name))

    def load(self, tokens: Sequence[int]) -> None:
        """Have `tokens` as the context, by reading on where they begin with what is in it already."""
        if self._ids != list(tokens[: self.n_tokens]):
            self.cut(0)
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
        """Decode a prompt's end and the answer to it; gives the logits after the prompt, and after each token
        of the answer."""
        if not self._recalls:
            return self.logits([*question, *answer])[len(question) - 1 :]
        self.read(question)
        last = logits_of(self.llm).copy()
        return np.stack([last, *(self.logits([token])[0] for token in answer)])

    def greedy(self, token: int, count: int) -> Logits:
        """Decode `token` and the most probable ones after it; gives the logits from which `count` of these
        are chosen."""
        found: list[Logits] = []
        for _ in range(count):
            found.append(self.logits([token])[-1])
            token = int(found[-1].argmax())
        return np.stack(found)

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
        self._recalls = policy.name == RECALL
        self.engine.recall(recall_of(self.config, "ahead") if self._recalls else Recall())
        try:
            yield
        finally:
            self.engine.recall(Recall())
            self._recalls = False

    def cells(self, share: float) -> int:
        """`share` of the context in whole blocks, so that every policy gives up the same number of cells."""
        block = self.config.block_cells
        return round(share * self.n_tokens / block) * block


def recall_of(config: GovernorConfig, mode: RecallMode, *, paused: bool = False) -> Recall:
    """The governor's settings. With `paused` it samples and scores, and exchanges nothing."""
    return Recall(
        mode=mode,
        sink_cells=config.sink_cells,
        window_cells=config.window_cells,
        bytes_per_s=config.recall_bytes_per_s,
        paused=paused,
    )


def _check_length(model: Path, n_ctx: int) -> None:
    """Before a context is made of it: llama.cpp would only warn. Raises BadInputError."""
    for name, field in GGUFReader(model).fields.items():
        if name.endswith(".context_length") and n_ctx > (trained := field.contents()):
            raise BadInputError(
                f"a context of {n_ctx} tokens is beyond this model's {trained}: say less (--ctx)"
            )
