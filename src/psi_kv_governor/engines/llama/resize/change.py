"""From a plan to one change of a context's size."""

from __future__ import annotations

import math
from collections.abc import Sequence

from psi_kv_governor.cache import Plan, Range, Result, Step, Verb
from psi_kv_governor.engines.llama.resize.context import ResizableContext
from psi_kv_governor.engines.llama.resize.pieces import Piece


class Change:
    """What a plan asks of a context. All of its steps are one change of size."""

    def __init__(self, context: ResizableContext, plan: Plan) -> None:
        self.problem = ""
        self.computed_bytes = 0
        """Bytes of the cells that the context has less (negative: more) than before."""
        self._resizer = context.resizer
        self._give: list[Range] = []
        self._back: list[Piece] = []
        self._masked = False
        self._release = False
        self._cells = self._back_cells = 0
        left = math.inf if plan.max_bytes is None else plan.max_bytes
        for step in plan.steps:
            left -= self._add(step, left)

    @property
    def empty(self) -> bool:
        """Whether there is nothing to do."""
        return not (self._give or self._back or self._release)

    def _add(self, step: Step, left: float) -> int:
        """Take `step` in; of what comes back as much as `left` bytes. Gives the bytes that it takes."""
        if step.verb is Verb.RELEASE:
            self._release = True
        elif step.verb in {Verb.PARK, Verb.MASK} and step.blob is None:
            self._masked |= step.verb is Verb.MASK
            self._give += list(step.ranges) or [Range(0, self._resizer.end)]
        elif step.verb in {Verb.UNMASK, Verb.UNPARK}:
            return self._bring(step, left)
        elif step.verb is not Verb.WRITE_BEHIND:
            self.problem = f"a context in memory of a device can't do this: {step.verb.value}"
        return 0

    def _bring(self, step: Step, left: float) -> int:
        n_bytes = 0
        for piece in self._resizer.pieces:
            wanted = piece.masked is (step.verb is Verb.UNMASK) and _touches(piece.part, step.ranges)
            if wanted and piece not in self._back and n_bytes < left:
                self._back.append(piece)
                n_bytes += piece.part.cells * self._resizer.cell_bytes
        return n_bytes

    def carry_out(self) -> None:
        """In a thread that no Ctrl-C reaches, while nobody decodes. Raises EngineError."""
        resizer, sizes, before = self._resizer, self._resizer.sizes, self._resizer.cells
        back = [piece for piece in self._back if piece in resizer.pieces]
        if self._give or self._release:
            resizer.rebuild(
                lambda live: min(before, sizes.for_cells(live)), self._give, back, masked=self._masked
            )
        elif len(back) == len(resizer.pieces):
            resizer.rebuild(
                lambda live: sizes.logical, back=back
            )  # whole again, and what it grows into as well
        else:
            resizer.rebuild(lambda live: max(before, sizes.for_cells(live)), back=back)
        self._cells = resizer.given_cells
        self._back_cells = sum(piece.part.cells for piece in back)
        self.computed_bytes = (before - resizer.cells) * resizer.cell_bytes

    def result(self, freed_bytes: int, seconds: float) -> Result:
        """What it came to; `freed_bytes` were counted."""
        cell_bytes = self._resizer.cell_bytes
        came_bytes = max(0, -freed_bytes, self._back_cells * cell_bytes) if self._back else 0
        return Result(
            bytes_returned=0 if self._back else max(0, freed_bytes),
            bytes_back=came_bytes,
            cells=self._cells + self._back_cells,
            masked=self._cells if self._masked else 0,
            written_bytes=self._cells * cell_bytes,
            seconds=seconds,
            problem=self.problem,
        )


def _touches(part: Range, ranges: Sequence[Range]) -> bool:
    return not ranges or any(part.start < one.stop and one.start < part.stop for one in ranges)
