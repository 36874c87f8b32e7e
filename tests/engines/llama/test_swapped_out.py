"""Cells that the kernel has put into zram: they are not read to be written, and free ones are freed there."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from psi_kv_governor.sandbox.sandbox import Sandbox

pytestmark = [pytest.mark.llama, pytest.mark.swap]

SCRIPT = """
import json, mmap, os, sys
from pathlib import Path
from psi_kv_governor.engines.llama import loader
agent = loader.load().agent
agent.configure(sys.argv[2], in_file=False, reserve_bytes=0, limit_bytes=0)
import llama_cpp
from psi_kv_governor.engines.llama.client import Client, InProcess, Op
llm = llama_cpp.Llama(sys.argv[1], n_ctx=512, n_threads=1, n_threads_batch=1, verbose=False, flash_attn=True)
llm.eval([i % 240 + 5 for i in range(480)])
client = Client(InProcess(agent.serve))

def status(name):
    text = Path("/proc/self/status").read_text()
    return int(text.split(name + ":")[1].split()[0]) << 10

def resident():
    return client.regions(count_resident=True)[0].resident

region = client.regions(count_resident=True)[0]
full, takes = resident(), []
while resident() > full // 4 and len(takes) < 400:  # so much more that the kernel puts the cache into zram
    takes.append(mmap.mmap(-1, 1 << 20))
    takes[-1].write(os.urandom(1 << 20))
    for other in takes:
        other[0] = 1
out = {"full": full, "left": resident(), "swapped": status("VmSwap")}
before = status("VmSwap")
reply = client.ask(Op.PARK, region.id, 0, ranges=[(0, 256)])
out |= {"written": reply.written, "problem": reply.problem, "read": before - status("VmSwap")}
assert llama_cpp.llama_memory_seq_rm(llama_cpp.llama_get_memory(llm.ctx), 0, 0, 192)
before = status("VmSwap")
reply = client.ask(Op.RELEASE, region.id)
out |= {"freed": before - status("VmSwap"), "released_problem": reply.problem}
print(json.dumps(out))
"""


def told_by(script: str, *words: str, limit_bytes: int) -> dict[str, Any]:
    """The line of JSON of a child in a cgroup with that limit, and with zram to swap to."""
    with Sandbox(limit_bytes, swap_bytes=512 << 20) as sandbox:
        child = sandbox.popen(
            [sys.executable, "-c", script, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        said, errors = child.communicate(timeout=800)
    assert child.returncode == 0, errors[-3000:].decode()
    out: dict[str, Any] = json.loads(said)
    return out


def test_what_is_in_zram_is_not_read_to_be_parked_and_is_freed_there_when_nobody_uses_it(wide_model, folder):
    out = told_by(SCRIPT, str(wide_model), str(folder), limit_bytes=300 << 20)
    assert out["left"] <= out["full"] // 4, out
    assert out["problem"] == ""
    # Only what was resident is written, and nothing came back from zram for it.
    assert out["written"] <= out["left"] + (1 << 20), out
    assert out["read"] <= 1 << 20, out
    # The first 192 of 480 positions are free now, nearly all of them in zram.
    assert out["freed"] > 0.3 * out["full"], out


FREED = """
import ctypes, json, sys, time
from pathlib import Path
from psi_kv_governor import GovernedLlama
from psi_kv_governor.config import GovernorConfig
import llama_cpp
config = GovernorConfig(place=sys.argv[2], place_reserve_bytes=0, backing="memory", status_socket=False)
llm = GovernedLlama(sys.argv[1], config=config, auto=False, n_ctx=512, n_threads=1, n_threads_batch=1,
                    verbose=False, flash_attn=True)
tokens = [i % 240 + 5 for i in range(384)]
llm.eval(tokens)

def swapped():
    text = Path("/proc/self/status").read_text()
    return int(text.split("VmSwap:")[1].split()[0]) << 10

def cache():
    return llm.governor.engine.snapshot().caches[0]

lines = [line.split() for line in open("/proc/self/maps")]
anonymous = [line[0].split("-") for line in lines if line[1] == "rw-p" and len(line) == 5]
spans = [(int(first, 16), int(last, 16)) for first, last in anonymous]
full = cache().resident_bytes
llama_cpp.llama_memory_seq_rm(llama_cpp.llama_get_memory(llm.ctx), 0, 64, -1)
llm.n_tokens = 64
libc = ctypes.CDLL(None, use_errno=True)
for first, last in spans:  # the kernel takes what nobody reads: at once, instead of by pressure
    if last - first >= full // 2:
        libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), 21)  # MADV_PAGEOUT
time.sleep(1.1)
out = {"full": full, "left": cache().resident_bytes, "before": swapped()}
until_s = time.monotonic() + 300  # a step has a deadline, and may free a part
while (out["before"] - swapped() <= 0.6 * full or cache().frees_swap) and time.monotonic() < until_s:
    llm.governor.step()
    time.sleep(0.1)
out["after"] = swapped()
time.sleep(1.1)
out["again"] = cache().frees_swap
llm.eval(tokens[64:74])
print(json.dumps(out))
llm.close()
"""


def test_free_cells_that_are_wholly_in_zram_are_freed_there_without_anybody_asking(wide_model, folder):
    out = told_by(FREED, str(wide_model), str(folder), limit_bytes=600 << 20)
    assert out["left"] < 1 << 20, out
    assert out["before"] > 0.8 * out["full"], out
    # 320 of its 384 cells are nobody's.
    assert out["before"] - out["after"] > 0.6 * out["full"], out
    assert out["again"] is False  # and then there is nothing left to do
