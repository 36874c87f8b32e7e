"""A neighbour that attacks at will, for real: floor, budget and context hold, and the answers keep coming."""

from __future__ import annotations

import json
import sys
import time

import pytest

from psi_kv_governor.sandbox.children import Child, neighbour
from psi_kv_governor.sandbox.load import MIB
from psi_kv_governor.sandbox.sandbox import Sandbox, drop_file_cache

pytestmark = [
    pytest.mark.llama,
    pytest.mark.cgroup,
    pytest.mark.swap,
    pytest.mark.slow,
]

LIMIT_BYTES = 200 * MIB
ATTACKS = 3
STEPS = 4
"""In which the neighbour takes what it wants."""

VICTIM = """
import ctypes, hashlib, json, pydoc_data.topics, select, sys, time
import numpy as np
from psi_kv_governor import GovernedLlama
from psi_kv_governor.config import GovernorConfig
from psi_kv_governor.events import ModeChanged, Trimmed
import llama_cpp

config = GovernorConfig(quiet_s=1.0)
llm = GovernedLlama(sys.argv[1], n_ctx=8192, n_threads=1, n_threads_batch=2, verbose=False, flash_attn=True,
                    config=config)
governor = llm.governor
text = "".join(pydoc_data.topics.topics.values())[:12000]
prompt = llm.tokenize(text.encode())[:1500]
llm.eval(prompt)

def rows():
    # Every K and V row of the prompt, as llama.cpp saves them: a layer after the other, rows of 384 bytes.
    size = llama_cpp.llama_state_seq_get_size(llm.ctx, 0)
    buffer = (ctypes.c_uint8 * size)()
    size = llama_cpp.llama_state_seq_get_data(llm.ctx, buffer, size, 0)
    saved = np.frombuffer(bytes(buffer)[:size], dtype=np.uint8)
    layer_bytes = 12 + llm.n_tokens * 384
    kinds = 2 * llama_cpp.llama_model_n_layer(llm.model)
    layers = saved[-kinds * layer_bytes:].reshape(kinds, layer_bytes)[:, 12:].reshape(kinds, -1, 384)
    return [hashlib.sha256(layers[:, position].tobytes()).hexdigest() for position in range(len(prompt))]

before = rows()
trims, reasons = [], []
def hear(event):
    if isinstance(event, Trimmed):
        trims.append((event.time_s - event.seconds, event.masked, llm.n_tokens))
    if isinstance(event, ModeChanged):
        reasons.append((event.old.value, event.new.value, event.reason))
governor.subscribe(hear)
print("ready", flush=True)
tokens = 0
while not select.select([sys.stdin], [], [], 0)[0] and llm.n_tokens < 8000:
    logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(llm.ctx, -1), (llm.n_vocab(),))
    llm.eval([int(logits.argmax())])
    tokens += 1
    (cache,) = governor.engine.snapshot().caches
    live, total = cache.sequences[0].live_cells, cache.sequences[0].next_position
    assert live >= max(config.floor_cells, config.floor_share * total), (live, total)
    print("token", flush=True)
end = time.monotonic() + 300
while governor.status().masked_cells and time.monotonic() < end:
    time.sleep(0.1)
    governor.restore()
after = rows()
print(json.dumps({
    "tokens": tokens, "trims": trims, "reasons": reasons, "masked_now": governor.status().masked_cells,
    "changed": sum(one != other for one, other in zip(before, after, strict=True)),
}), flush=True)
llm.close()
"""


def hear(victim: Child, seconds: float) -> list[bytes]:
    """What the victim says in so many seconds."""
    said: list[bytes] = []
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        said += victim.hear(left)
        assert not victim.ended, victim.complaint()
    return said


def attack(victim: Child, attacker: Child) -> int:
    """Tokens of the victim while the attacker has all that it takes: to start takes it seconds, at times."""
    taken = 0
    until_s = time.monotonic() + 120
    while taken <= STEPS:  # and the line with which it begins
        taken += len(attacker.hear(0.1))
        assert time.monotonic() < until_s, attacker.complaint()
    victim.hear(0.0)  # what it said before
    said = hear(victim, 2.5)
    while b"token" not in said and time.monotonic() < until_s:  # the machine may have other work
        said += hear(victim, 0.5)
    return said.count(b"token")


def test_whatever_a_neighbour_does_the_context_is_there_at_the_end(shallow_model):
    drop_file_cache(shallow_model)
    argv = [sys.executable, "-c", VICTIM, str(shallow_model)]
    with (
        Sandbox(LIMIT_BYTES, swap_bytes=2 * LIMIT_BYTES) as sandbox,
        Child(argv, sandbox.popen) as victim,
    ):
        while b"ready" not in hear(victim, 0.5):
            pass
        answered = []
        for _ in range(ATTACKS):
            with Child(neighbour(180, 180 // STEPS, 0.01), sandbox.popen) as attacker:
                answered.append(attack(victim, attacker))
            hear(victim, 2.5)  # just long enough for some of it to be restored
        victim.send(b"end")
        told: list[bytes] = []
        while not victim.ended:
            told += victim.hear(120.0)
        assert told[-1].startswith(b"{"), victim.complaint()
    found = json.loads(told[-1])
    assert all(answered), answered
    assert found["trims"], found["reasons"]
    for _, cells, total in found["trims"]:
        assert cells <= 0.8 * total
    for at_s, _, total in found["trims"]:
        # The law counts 60 s from its readings, and what was decided then begins up to seconds later.
        assert sum(c for t, c, _ in found["trims"] if at_s - 55 <= t <= at_s) <= 2 * total
    assert found["masked_now"] == 0
    assert found["changed"] == 0
    assert all(old != new and reason for old, new, reason in found["reasons"])
    assert "trimming" in {new for _, new, _ in found["reasons"]}
