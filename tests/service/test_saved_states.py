"""A saved state is what was last written to it, wherever its pages are."""

from __future__ import annotations

import contextlib
import itertools
import subprocess
import sys

import pytest
from servers import with_agent

from psi_kv_governor.cache import Plan, Result, Step, Verb
from psi_kv_governor.engines.llama.fleet import Fleet
from waiting import until

pytestmark = pytest.mark.llama
AHEAD_BYTES = 128 << 10
"""Read ahead at a time: a disk that is busy is waited for once for each, and the kernel counts that wait as a
major fault. Page by page there would be 32 of them in each."""

# A program that saves one sequence, and then another one into the same memory, as servers do for speculation.
SAVES = """
import ctypes, hashlib, sys
import llama_cpp
llm = llama_cpp.Llama(sys.argv[1], n_ctx=512, n_threads=1, verbose=False, flash_attn=True)
new = ctypes.CDLL(None)._Znwm
new.restype, new.argtypes = ctypes.c_void_p, (ctypes.c_size_t,)
at = None

def save(token):
    global at
    llm.reset()
    llm._ctx.kv_cache_clear()
    llm.eval([token] * 64)
    size = llama_cpp.llama_state_seq_get_size_ext(llm.ctx, 0, 0)
    at = at or new(size)
    to = ctypes.cast(at, ctypes.POINTER(ctypes.c_uint8))
    assert llama_cpp.llama_state_seq_get_data_ext(llm.ctx, to, size, 0, 0) == size
    return hashlib.sha256(ctypes.string_at(at, size)).hexdigest(), size

first, size = save(104)
print(first, flush=True)
sys.stdin.readline()
second, size = save(165)
print(second, flush=True)
sys.stdin.readline()
print(hashlib.sha256(ctypes.string_at(at, size)).hexdigest(), flush=True)
"""


LOADS = """
import ctypes, resource, sys
import llama_cpp
llm = llama_cpp.Llama(sys.argv[1], n_ctx=512, n_threads=1, verbose=False, flash_attn=True)
new = ctypes.CDLL(None)._Znwm
new.restype, new.argtypes = ctypes.c_void_p, (ctypes.c_size_t,)
llm.eval([104] * 96)
size = llama_cpp.llama_state_seq_get_size_ext(llm.ctx, 0, 0)
state = ctypes.cast(new(size), ctypes.POINTER(ctypes.c_uint8))
assert llama_cpp.llama_state_seq_get_data_ext(llm.ctx, state, size, 0, 0) == size
print(size, flush=True)
sys.stdin.readline()
llm._ctx.kv_cache_clear()
before = resource.getrusage(resource.RUSAGE_SELF).ru_majflt
assert llama_cpp.llama_state_seq_set_data_ext(llm.ctx, state, size, 0, 0) == size
print(resource.getrusage(resource.RUSAGE_SELF).ru_majflt - before, flush=True)
"""

# A program that frees states and saves new ones while the old ones are being written.
FREES_WHILE_WRITTEN = """
import ctypes, hashlib, sys, threading
import llama_cpp
llm = llama_cpp.Llama(sys.argv[1], n_ctx=512, n_threads=1, verbose=False, flash_attn=True)
new, delete = ctypes.CDLL(None)._Znwm, ctypes.CDLL(None)._ZdlPv
new.restype, new.argtypes, delete.argtypes = ctypes.c_void_p, (ctypes.c_size_t,), (ctypes.c_void_p,)
llm.eval([104] * 64)
files = lambda: open("/proc/self/maps").read().count("(deleted)")
ended, seen, before = threading.Event(), set(), files()
threading.Thread(target=lambda: (sys.stdin.readline(), ended.set())).start()
print(flush=True)
number = 0
while not ended.is_set():
    size = llama_cpp.llama_state_seq_get_size_ext(llm.ctx, 0, 0)
    at = new(size)
    to = ctypes.cast(at, ctypes.POINTER(ctypes.c_uint8))
    for _ in range(1 + number % 2):  # every other one is written again
        assert llama_cpp.llama_state_seq_get_data_ext(llm.ctx, to, size, 0, 0) == size
    seen.add(hashlib.sha256(ctypes.string_at(at, size)).hexdigest())
    assert llama_cpp.llama_state_seq_set_data_ext(llm.ctx, to, size, 0, 0) == size
    delete(at)
    number += 1
print(len(seen), files() - before, flush=True)
"""


def do_all(fleet: Fleet, verb: Verb) -> tuple[int, Result]:
    caches = [cache for cache in fleet.snapshot().caches if cache.blobs]
    steps = tuple(Step(verb=verb, cache=cache.id, blob=blob.id) for cache in caches for blob in cache.blobs)
    return len(steps), fleet.apply(Plan(steps=steps))


def park_all(fleet: Fleet) -> tuple[int, Result]:
    return do_all(fleet, Verb.PARK)


def test_one_that_is_written_again_after_it_was_parked_is_the_new_one(wide_model, folder):
    results: list[tuple[int, Result]] = []
    with program_of(SAVES, wide_model, folder, "memory") as (program, fleet, first):
        hashes = [first]
        for _ in range(2):
            results.append(park_all(fleet))
            print(file=program.stdin, flush=True)
            hashes.append(program.stdout.readline())
    first, second, read_back = hashes
    assert first != second == read_back
    assert [n for n, _ in results] == [1, 1]
    assert all(result.bytes_returned > 1 << 20 for _, result in results)


@contextlib.contextmanager
def program_of(script, model, folder, backing, beside=""):
    """A program that waits for a line, its sidecar, and what it said. `beside` is a library of its own to
    preload."""
    with contextlib.closing(Fleet(place=str(folder), backing=backing)) as fleet:
        command = [sys.executable, "-c", script, str(model)]
        environ = with_agent(fleet.name, folder, backing)
        environ["LD_PRELOAD"] += f":{beside}" if beside else ""
        with subprocess.Popen(
            command, env=environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as program:
            said = program.stdout.readline()
            until(lambda: bool(fleet.pids), "no agent came")  # it connects in a thread of its own
            yield program, fleet, said


def test_one_that_is_loaded_is_read_ahead_and_not_page_by_page(wide_model, folder):
    with program_of(LOADS, wide_model, folder, "memory") as (program, fleet, said):
        size = int(said)
        _, done = park_all(fleet)
        assert done.bytes_returned >= size // 2
        print(file=program.stdin, flush=True)
        major_faults = int(program.stdout.readline())
    assert major_faults < size // AHEAD_BYTES * 2


def test_one_that_is_only_written_is_loaded_without_the_disk(wide_model, folder):
    with program_of(LOADS, wide_model, folder, "memory") as (program, fleet, said):
        size = int(said)
        _, done = do_all(fleet, Verb.WRITE_BEHIND)
        assert done.written_bytes >= size
        assert [blob.parked for cache in fleet.snapshot().caches for blob in cache.blobs] == [True]
        print(file=program.stdin, flush=True)
        assert int(program.stdout.readline()) < 16


def test_one_that_is_freed_while_it_is_written_goes_and_nothing_else(wide_model, folder):
    with program_of(FREES_WHILE_WRITTEN, wide_model, folder, "memory") as (program, fleet, _):
        written = 0
        for verb in itertools.cycle((Verb.PARK, Verb.WRITE_BEHIND)):
            written += do_all(fleet, verb)[1].written_bytes > 0
            if written > 10:
                break
        print(file=program.stdin, flush=True)
        different, mapped = map(int, program.stdout.readline().split())
    assert (different, mapped) == (1, 0)


SAVES_PARKED = """
import ctypes, resource, sys
import llama_cpp
llm = llama_cpp.Llama(sys.argv[1], n_ctx=512, n_threads=1, verbose=False, flash_attn=True)
llm.eval([104] * 96)
size = llama_cpp.llama_state_seq_get_size_ext(llm.ctx, 0, 0)
state = (ctypes.c_uint8 * size)()
assert llama_cpp.llama_state_seq_get_data_ext(llm.ctx, state, size, 0, 0) == size
saved = bytes(state)
print(size, flush=True)
sys.stdin.readline()
before = resource.getrusage(resource.RUSAGE_SELF).ru_majflt
assert llama_cpp.llama_state_seq_get_data_ext(llm.ctx, state, size, 0, 0) == size
print(resource.getrusage(resource.RUSAGE_SELF).ru_majflt - before, bytes(state) == saved, flush=True)
"""


def test_a_parked_sequence_that_is_saved_is_read_ahead_and_not_page_by_page(wide_model, folder):
    with program_of(SAVES_PARKED, wide_model, folder, "file") as (program, fleet, said):
        size = int(said)
        (cache,) = [cache for cache in fleet.snapshot().caches if cache.sequences]
        done = fleet.apply(Plan(steps=(Step(verb=Verb.PARK, cache=cache.id, sequence=0),)))
        assert done.bytes_returned >= size // 2
        print(file=program.stdin, flush=True)
        major_faults, same = program.stdout.readline().split()
    assert same == "True"
    assert int(major_faults) < size // 4096 // 8


ON_PAGES = """
#include <stddef.h>
int on_pages;
extern void * __libc_malloc(size_t), * __libc_memalign(size_t, size_t);
void * malloc(size_t bytes) { return on_pages ? __libc_memalign(4096, bytes) : __libc_malloc(bytes); }
"""
"""A `malloc` that puts everything at the start of a page, where saved states are as well. Of an ordinary one
that is one piece in 256: so seldom llama-server stood still for ever."""

FREES = SAVES.replace(
    "print(first, flush=True)",
    "llm._ctx.kv_cache_seq_rm(0, 48, -1)\n"
    "ctypes.c_int.in_dll(ctypes.CDLL(None), 'on_pages').value = 1\n"
    "print(first, flush=True)",
)


def test_what_llama_cpp_frees_while_it_is_asked_for_its_cells_is_not_waited_for(wide_model, folder, compiled):
    library = compiled("on_pages.so", ON_PAGES, "-shared", "-fPIC")
    with program_of(FREES, wide_model, folder, "memory", library) as (program, fleet, first):
        (cache,) = [cache for cache in fleet.snapshot().caches if cache.sequences]
        assert cache.sequences[0].next_position == 48
        assert park_all(fleet)[1].bytes_returned > 1 << 20
        print(file=program.stdin, flush=True)
        assert program.stdout.readline() != first
        print(file=program.stdin, flush=True)
