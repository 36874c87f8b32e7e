"""A disk that can't be read any more ends a program, and it is said whose disk it was."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from servers import with_agent

from psi_kv_governor.cache import Plan, Step, Verb
from psi_kv_governor.engines.llama.fleet import Fleet
from psi_kv_governor.governor import Governor
from waiting import PATIENCE_S, until

pytestmark = pytest.mark.llama

READS = """
import sys
from llama_cpp import Llama
llm = Llama(sys.argv[1], n_ctx=512, n_threads=1, verbose=False, flash_attn=True)
llm.eval([104] * 96)
print("up", flush=True)
sys.stdin.readline()
llm.eval([1])
print("an answer", flush=True)
"""


def _lose(pid: int) -> int:
    """The parked files are empty all at once: what the kernel then says is what it says of a read error."""
    lost = 0
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            if "(deleted)" in str(link.readlink()) and link.stat().st_size > 1 << 20:
                with open(link, "r+b") as file:
                    file.truncate(0)
                lost += 1
    return lost


@pytest.mark.parametrize("backing", ["file", "memory"])
def test_a_read_error_of_parked_context_names_the_place(wide_model, folder, backing):
    fleet = Fleet(place=str(folder), backing=backing)
    with (
        contextlib.closing(fleet),
        subprocess.Popen(
            [sys.executable, "-c", READS, str(wide_model)], env=with_agent(fleet.name, folder, backing),
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        ) as program,
    ):  # fmt: skip
        assert program.stdout.readline() == "up\n"
        until(lambda: bool(fleet.pids), "no agent came")
        until(lambda: not any(s.running for c in fleet.snapshot().caches for s in c.sequences), "not idle")
        Governor(fleet).park()
        assert _lose(program.pid) == 1
        out, said = program.communicate("\n", timeout=PATIENCE_S)
    assert out == ""
    assert program.returncode == -signal.SIGBUS
    (line,) = [line for line in said.splitlines() if line.startswith("psi-kv: ")]
    assert "can't be read back" in line
    assert str(folder) in line


CHECKPOINT = """
import ctypes, hashlib, sys
import llama_cpp
llm = llama_cpp.Llama(sys.argv[1], n_ctx=512, n_threads=1, verbose=False, flash_attn=True)
llm.eval([104] * 64)
new = ctypes.CDLL(None)._Znwm
new.restype, new.argtypes = ctypes.c_void_p, (ctypes.c_size_t,)
print("up", flush=True)
sys.stdin.readline()
checkpoint = 1  # LLAMA_STATE_SEQ_FLAGS_SWA_ONLY: what servers save for going back
size = llama_cpp.llama_state_seq_get_size_ext(llm.ctx, 0, 0)
assert llama_cpp.llama_state_seq_get_size_ext(llm.ctx, 0, checkpoint) <= size
at = new(llama_cpp.llama_state_seq_get_size_ext(llm.ctx, 0, checkpoint))
to = ctypes.cast(at, ctypes.POINTER(ctypes.c_uint8))
n = llama_cpp.llama_state_seq_get_data_ext(llm.ctx, to, size, 0, checkpoint)
print(n, hashlib.sha256(ctypes.string_at(at, n)).hexdigest(), flush=True)
sys.stdin.readline()
print(n, hashlib.sha256(ctypes.string_at(at, n)).hexdigest(), flush=True)
"""


def test_a_checkpoint_is_never_refused_and_is_the_same_after_it_was_parked(wide_model, folder):
    fleet = Fleet(place=str(folder), backing="memory")
    with (
        contextlib.closing(fleet),
        subprocess.Popen(
            [sys.executable, "-c", CHECKPOINT, str(wide_model)],
            env=with_agent(fleet.name, folder, "memory"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as program,
    ):
        assert program.stdout.readline() == "up\n"
        until(lambda: bool(fleet.pids), "no agent came")
        fleet.refuse_blobs(True)  # the prompt cache: a checkpoint must be had
        print(file=program.stdin, flush=True)
        saved = program.stdout.readline()
        assert int(saved.split()[0]) > 1 << 20
        (cache,) = [cache for cache in fleet.snapshot().caches if cache.blobs]
        (blob,) = cache.blobs
        assert blob.kind == "checkpoint"
        done = fleet.apply(Plan(steps=(Step(verb=Verb.PARK, cache=cache.id, blob=blob.id),)))
        assert done.bytes_returned >= blob.n_bytes // 2
        assert program.communicate("\n", timeout=PATIENCE_S)[0] == saved
