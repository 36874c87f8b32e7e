"""The proof at the start: what it cannot show is not done, the model runs all the same, and nothing stays."""

from __future__ import annotations

import os
import subprocess
import sys

import llama_cpp
import numpy as np
import pytest
from engine_help import SOURCES, greedy, plain_twin, some_tokens
from models import HYBRID, LARGE, LLAMA, MAMBA, WIDE

from psi_kv_governor.engine.llama.rows import Rows
from psi_kv_governor.engine.llama.tap import Tap
from psi_kv_governor.errors import EngineError
from psi_kv_governor.ledger import LIVE

pytestmark = pytest.mark.llama
KINDS = {
    "f16": llama_cpp.GGML_TYPE_F16,
    "q8_0": llama_cpp.GGML_TYPE_Q8_0,
    "q4_0": llama_cpp.GGML_TYPE_Q4_0,
    "f32": 0,
}


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("shape", [LLAMA, LARGE, WIDE], ids=["small rows", "rows of 1 KiB", "rows of 64 KiB"])
def test_every_usual_cache_is_proven(open_llm, shape, kind):
    able = open_llm(shape, n_ctx=256, type_k=kind, type_v=kind).governor.capabilities
    assert all(
        getattr(able, step).able and not getattr(able, step).why for step in ("release", "spill", "recompute")
    )


def test_nothing_of_the_probe_stays(open_llm):
    llm = open_llm()
    assert len(llm._engine.ledger) == llm._engine.track.sequences.length() == 0
    for memory in llm._engine._rows._memory:
        assert not memory[2:].any()  # what it overwrote is zero again: a NaN there would be multiplied
    twin = plain_twin(llm)
    tokens = some_tokens(100)
    assert greedy(llm, tokens, 20) == greedy(twin, tokens, 20)


def released_in_part(self: Rows, returnable: np.ndarray) -> int:
    return 0


def released_too_much(self: Rows, returnable: np.ndarray) -> int:
    for memory in self._memory:
        memory[:] = 0
    return 4096


def released_without_effect(self: Rows, returnable: np.ndarray) -> int:
    return 4096


def refused(self: Rows, returnable: np.ndarray) -> int:
    raise EngineError("the kernel refused to take pages back")


FLAWS = {
    "the rows are not where the graph says": (Rows, "are_in", lambda *_: False),
    "released pages stayed resident": (Rows, "release", released_in_part),
    "releasing free cells changed live ones": (Rows, "release", released_too_much),
    "released pages kept their content": (Rows, "release", released_without_effect),
    "the kernel refused to take pages back": (Rows, "release", refused),
    "two tokens were decoded, and 3 cells were seen": (Tap, "cells", lambda *_: np.arange(3)),
    "the cell indices are not in reach": (Tap, "problem", lambda *_: "the cell indices are not in reach"),
    "no KV cache of rows": (Tap, "lead_and_tensors", lambda *_: []),
}


@pytest.mark.parametrize("why", FLAWS)
def test_what_cannot_be_shown_is_not_done(open_llm, monkeypatch, caplog, why):
    monkeypatch.setattr(*FLAWS[why])
    llm = open_llm(auto=True)
    monkeypatch.undo()
    able = llm.governor.capabilities
    assert not any(step.able for step in (able.release, able.spill, able.recompute))
    assert why in able.release.why
    assert [record.message for record in caplog.records if why in record.message]
    with pytest.raises(EngineError, match=why):
        llm.governor.trim()
    tokens = some_tokens(100)
    assert greedy(llm, tokens, 20) == greedy(plain_twin(llm), tokens, 20)
    assert llm.governor.status().live_cells == 0  # nobody counts them


def test_a_probe_that_cannot_be_decoded_is_told(open_llm, monkeypatch):
    from llama_cpp import _internals

    monkeypatch.setattr(_internals.llama_cpp, "llama_decode", lambda *_: -3)
    llm = open_llm()
    monkeypatch.undo()
    assert "could not decode (llama_decode returned -3)" in llm.governor.capabilities.release.why
    assert llm.create_completion(some_tokens(20), max_tokens=2)["usage"]["prompt_tokens"] == 20


@pytest.mark.parametrize(
    ("shape", "status", "spills"), [(LLAMA, 0, "yes"), (HYBRID, 0, "no"), (MAMBA, 1, "no")]
)
def test_it_is_a_command_too(tiny_model, shape, status, spills):
    done = subprocess.run(
        [sys.executable, "-m", "psi_kv_governor.engine.llama.selftest", "--model", str(tiny_model(shape))],
        env={**os.environ, "PYTHONPATH": str(SOURCES)},
        capture_output=True,
        text=True,
        check=False,
    )
    lines = done.stdout.splitlines()
    assert done.returncode == status, done.stderr
    assert [line.split(":")[0] for line in lines] == ["release", "spill", "recompute"]
    assert lines[1].startswith(f"spill: {spills}")


def test_the_cache_is_counted_right_after_the_probe(open_llm):
    llm = open_llm()
    llm.eval(some_tokens(3))
    assert llm._engine.ledger.count(LIVE) == 3
