"""One life: a model in one surrounding, from its opening to the calm after the others."""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import msgspec

from psi_kv_governor.children import reason
from psi_kv_governor.errors import PsiKvError
from psi_kv_governor.sandbox.process_memory import glance
from psi_kv_governor.sandbox.text import prompt_tokens
from psikv_bench import llm as states
from psikv_bench.messages import Setup, Variant
from psikv_bench.survival import subject, whole
from psikv_bench.survival.around import Around
from psikv_bench.survival.surroundings import SURROUNDINGS

Outcome = Literal["lives", "killed", "error", "stuck", "not here"]
_OPEN_S, _DECODE_S = 300.0, 120.0
"""Past that it is stuck: a token takes 50 ms, and thrashing a hundred times as long is no life. Opening
may have to compile the agent first: 40 s on a machine that does other work."""
_KILLED = frozenset({-9, -31, 137, 159})
"""SIGKILL and SIGSYS, also as a shell in between tells them."""


class Run(msgspec.Struct, frozen=True, kw_only=True):
    """One life."""

    surrounding: str
    variant: Variant
    outcome: Outcome
    why: str = ""
    """The last that it said on stderr, or why it can't be run here."""
    tokens: list[int] = []
    """Decoded while the others were there."""
    again: list[int] = []
    """The first ones once more when they were gone."""
    tokens_per_s: float = 0.0
    masked: int = 0
    returned_bytes: int = 0
    ungoverned: str = ""


class EndedError(PsiKvError):
    """It did not say in time what was waited for."""

    def __init__(self, outcome: Outcome) -> None:
        super().__init__(f"plain llama.cpp can't be run: {outcome}")
        self.outcome = outcome


@contextlib.contextmanager
def workshop() -> Iterator[Path]:
    """A folder that every user can enter, on a disk."""
    with tempfile.TemporaryDirectory(
        prefix="psi-kv-survival-", dir="/var/tmp", ignore_cleanup_errors=True
    ) as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


def prepared(
    model_path: str, n_context: int, tokens: int, folder: Path
) -> tuple[subject.Order, tuple[int, int]]:
    """The order without a variant, and what plain llama.cpp takes in all and for its cache."""
    model, state = folder / "model.gguf", folder / "state"
    try:
        os.link(model_path, model)
    except OSError:  # on another disk
        shutil.copyfile(model_path, model)
    cells = -(-(n_context + tokens + subject.CALM_TOKENS + 1) // 256) * 256
    llm = states.opened(Setup(variant="file-only", model=str(model), context_cells=cells, prefill_threads=1))
    try:
        context = prompt_tokens(llm, n_context)
        llm.eval(context[:-1])
        cache_bytes = states.cell_bytes(llm) * cells
        states.save_state(llm, str(state), len(context) - 1)
    finally:
        llm.close()
    state.chmod(0o644)
    order = subject.Order(
        variant="fixed", model=str(model), state=str(state), context=context, cells=cells, tokens=tokens
    )
    with contextlib.ExitStack() as ending, _started(order, Around(folder, 0, cache_bytes, ending)) as child:
        _hear(child, "ready", _OPEN_S)
        return order, (getattr(glance(child.pid), "anonymous_bytes", 0), cache_bytes)


def live(name: str, variant: Variant, base: subject.Order, need: tuple[int, int], folder: Path) -> Run:
    """One life in one surrounding."""
    place = folder / f"{name}-{variant}"
    place.mkdir()
    place.chmod(0o1777)
    try:
        with contextlib.ExitStack() as ending:
            around = Around(place, *need, ending)
            SURROUNDINGS[name](around)
            order = msgspec.structs.replace(
                base, variant=variant, locks=around.locks, settings=around.settings, beside=around.beside
            )
            return _lived(name, order, around)
    except PsiKvError as error:
        return Run(surrounding=name, variant=variant, outcome="not here", why=str(error))
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _lived(name: str, order: subject.Order, around: Around) -> Run:
    said: dict[str, subject.Said] = {}
    outcome: Outcome = "lives"
    with _started(order, around) as child:
        try:
            said["ready"] = _hear(child, "ready", _OPEN_S)
            with _neighbour(around):
                _go_on(child)
                with around.during():
                    said["decoded"] = _hear(child, "decoded", _DECODE_S)
            _go_on(child)
            said["calm"] = _hear(child, "calm", _DECODE_S)
        except EndedError as end:
            outcome = end.outcome
        why = _end(child, kill=outcome == "stuck") or ("it said nothing" if outcome == "stuck" else "")
        if outcome == "lives" and child.returncode:
            outcome = _outcome(child.returncode)
    nothing = subject.Said(event="")
    ready, decoded, calm = (said.get(event, nothing) for event in ("ready", "decoded", "calm"))
    return Run(
        surrounding=name,
        variant=order.variant,
        outcome=outcome,
        why=why,
        tokens=decoded.tokens,
        again=calm.tokens,
        tokens_per_s=len(decoded.tokens) / decoded.seconds if decoded.seconds else 0.0,
        masked=decoded.masked,
        returned_bytes=decoded.returned_bytes,
        ungoverned=ready.ungoverned,
    )


def _outcome(status: int) -> Outcome:
    return "killed" if status in _KILLED else "error"


@contextlib.contextmanager
def _started(order: subject.Order, around: Around) -> Iterator[subprocess.Popen[bytes]]:
    argv = around.wrap([sys.executable, "-m", subject.__name__, msgspec.json.encode(order).decode()])
    start = subprocess.Popen if around.sandbox is None else around.sandbox.popen
    environ = {"PATH": os.environ["PATH"], "OPENBLAS_NUM_THREADS": "1", "HOME": os.environ.get("HOME", "/")}
    child: subprocess.Popen[bytes] = start(
        argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd="/",
        env={**environ, **around.environ},
    )  # fmt: skip
    try:
        yield child
    finally:
        whole.kill(child)
        child.wait()
        for pipe in filter(None, (child.stdin, child.stdout, child.stderr)):
            with contextlib.suppress(BrokenPipeError):
                pipe.close()


@contextlib.contextmanager
def _neighbour(around: Around) -> Iterator[None]:
    """Beside it, where there is one."""
    where = around.other or around.sandbox
    if around.neighbour is None or where is None:
        yield
        return
    with where.popen(around.neighbour, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as child:
        try:
            assert child.stdout is not None, "it is started with a pipe"
            child.stdout.readline()  # it begins
            yield
        finally:
            child.kill()


def _go_on(child: subprocess.Popen[bytes]) -> None:
    assert child.stdin is not None, "it is started with a pipe"
    with contextlib.suppress(BrokenPipeError):
        child.stdin.write(b"go\n")
        child.stdin.flush()


def _hear(child: subprocess.Popen[bytes], event: str, limit_s: float) -> subject.Said:
    """What it says of `event`. Raises EndedError."""
    assert child.stdout is not None, "it is started with a pipe"
    until_s = time.monotonic() + limit_s
    while (left_s := until_s - time.monotonic()) > 0 and select.select([child.stdout], [], [], left_s)[0]:
        line = child.stdout.readline()
        if not line:
            raise EndedError(_outcome(child.wait()))
        if line.startswith(b"ended "):  # on a whole machine, which outlives it
            raise EndedError(_outcome(int(line.split()[1])))
        with contextlib.suppress(msgspec.DecodeError):
            said = msgspec.json.decode(line, type=subject.Said)
            if said.event == event:
                return said
    raise EndedError("stuck")


def _end(child: subprocess.Popen[bytes], *, kill: bool) -> str:
    """Wait for its end; gives the last that it said on stderr, which is a pipe: it may be allowed no file."""
    if kill:
        whole.kill(child)
    assert child.stderr is not None, "it is started with a pipe"
    said = child.stderr.read()
    child.wait()
    return reason(said)[:300] if said else ""
