"""One life: a model in one surrounding, from its opening to the calm after the others."""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import msgspec

from psi_kv_governor.errors import PsiKvError
from psi_kv_governor.sandbox import llm as models
from psi_kv_governor.sandbox.messages import Setup, Variant
from psi_kv_governor.sandbox.process_memory import glance
from psi_kv_governor.sandbox.text import prompt_tokens
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
    written_bytes: int = 0
    ungoverned: str = ""


@contextlib.contextmanager
def workshop() -> Iterator[Path]:
    """A folder that every user can enter, on a disk."""
    folder = Path("/var/tmp") / f"psi-kv-survival-{os.getpid()}"
    folder.mkdir()
    folder.chmod(0o755)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def prepared(
    model_path: str, n_context: int, tokens: int, folder: Path
) -> tuple[subject.Order, tuple[int, int]]:
    """The order without a variant, and what plain llama.cpp takes in all and for its cache."""
    model = folder / "model.gguf"
    with contextlib.suppress(OSError):
        os.link(model_path, model)
    if not model.exists():
        shutil.copyfile(model_path, model)
    cells = -(-(n_context + tokens + subject.CALM_TOKENS + 1) // 256) * 256
    llm = models.open_llm(Setup(variant="file-only", model=str(model), settings={}), cells, 1)
    try:
        context = prompt_tokens(llm, n_context)
        llm.eval(context[:-1])
        cache_bytes = models.cell_bytes(llm) * cells
        models.save_state(llm, str(folder / "state"), len(context) - 1)
    finally:
        llm.close()
    (folder / "state").chmod(0o644)
    order = subject.Order(
        variant="fixed",
        model=str(model),
        state=str(folder / "state"),
        context=context,
        cells=cells,
        tokens=tokens,
    )
    with contextlib.ExitStack() as ending:
        place = folder / "need"
        place.mkdir()
        around = Around(place, 0, cache_bytes, ending)
        with _started(order, around) as child:
            _hear(child, "ready", _OPEN_S)
            need_bytes = getattr(glance(child.pid), "anonymous_bytes", 0)
    return order, (need_bytes, cache_bytes)


def live(name: str, variant: Variant, base: subject.Order, need: tuple[int, int], folder: Path) -> Run:
    """One life in one surrounding."""
    place = folder / f"{name}-{variant}"
    place.mkdir()
    place.chmod(0o1777)
    try:
        with contextlib.ExitStack() as ending:
            around = Around(place, need[0], need[1], ending)
            SURROUNDINGS[name](around)
            order = msgspec.structs.replace(
                base,
                variant=variant,
                locks=around.locks,
                settings=around.settings,
                beside=around.beside,
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
        for event, limit_s in (("ready", _OPEN_S), ("decoded", _DECODE_S), ("calm", _DECODE_S)):
            found = _heard_during(child, event, limit_s, around)
            if isinstance(found, str):
                outcome = found
                break
            said[event] = found
        why = _end(child, kill=outcome == "stuck") or (f"no `{event}`" if outcome == "stuck" else "")
        if outcome == "lives" and child.returncode:
            outcome = "killed" if child.returncode in _KILLED else "error"
    decoded = said.get("decoded", subject.Said(event=""))
    return Run(
        surrounding=name,
        variant=order.variant,
        outcome=outcome,
        why=why,
        tokens=decoded.tokens,
        again=said["calm"].tokens if "calm" in said else [],
        tokens_per_s=len(decoded.tokens) / decoded.seconds if decoded.seconds else 0.0,
        masked=decoded.masked,
        returned_bytes=decoded.returned_bytes,
        written_bytes=decoded.written_bytes,
        ungoverned=said["ready"].ungoverned if "ready" in said else "",
    )


def _heard_during(
    child: subprocess.Popen[bytes], event: str, limit_s: float, around: Around
) -> subject.Said | Outcome:
    """What it says after `event`; with the neighbour beside it while it decodes."""
    if event == "ready":
        return _hear(child, event, limit_s)
    assert child.stdin is not None
    with contextlib.ExitStack() as ending:
        if event == "decoded" and around.neighbour is not None:
            ending.enter_context(_neighbour(around))
        with contextlib.suppress(BrokenPipeError):
            child.stdin.write(b"go\n")
            child.stdin.flush()
        if event == "decoded":
            ending.enter_context(around.during())
        return _hear(child, event, limit_s)


@contextlib.contextmanager
def _started(order: subject.Order, around: Around) -> Iterator[subprocess.Popen[bytes]]:
    argv = around.wrap(
        [sys.executable, "-m", "psikv_bench.survival.subject", msgspec.json.encode(order).decode()]
    )
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
        for pipe in (child.stdin, child.stdout, child.stderr):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()


@contextlib.contextmanager
def _neighbour(around: Around) -> Iterator[None]:
    where = around.other or around.sandbox
    assert where is not None
    assert around.neighbour is not None
    child = where.popen(around.neighbour, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    try:
        assert child.stdout is not None
        child.stdout.readline()  # it begins
        yield
    finally:
        child.kill()
        child.wait()
        assert child.stdout is not None
        child.stdout.close()


def _hear(child: subprocess.Popen[bytes], event: str, limit_s: float) -> subject.Said | Outcome:
    assert child.stdout is not None
    until_s = time.monotonic() + limit_s
    while (left_s := until_s - time.monotonic()) > 0:
        if not select.select([child.stdout], [], [], left_s)[0]:
            break
        line = child.stdout.readline()
        if not line:
            child.wait()
            return "killed" if child.returncode in _KILLED else "error"
        if line.startswith(b"ended "):  # on a whole machine, which outlives it
            return "killed" if int(line.split()[1]) in _KILLED else "error"
        with contextlib.suppress(msgspec.DecodeError):
            said = msgspec.json.decode(line, type=subject.Said)
            if said.event == event:
                return said
    return "stuck"


def _end(child: subprocess.Popen[bytes], *, kill: bool) -> str:
    """Wait for its end; gives the last that it said on stderr, which is a pipe: it may be allowed no file."""
    if kill:
        whole.kill(child)
    assert child.stderr is not None
    lines = child.stderr.read().decode(errors="replace").strip().splitlines()
    child.wait()
    return lines[-1][:300] if lines else ""
