"""A llama.cpp that is linked into a program and calls itself by address: its cache is paged on demand."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from servers import PSI_KV, node_addon

from packages_help import Unavailable
from waiting import PATIENCE_S

HERE = Path(__file__).parent

# Allocates and zeroes a large buffer as ggml does; says resident MiB, and whether what it reads is right.
ZEROES = r"""
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>
static const size_t n = 128ul << 20;
static int resident(void) {
    long a, b; FILE * f = fopen("/proc/self/statm", "r");
    (void) !fscanf(f, "%ld %ld", &a, &b); fclose(f);
    return (int) (b * sysconf(_SC_PAGESIZE) >> 20);
}
static int all(const unsigned char * p, int value) {
    for (size_t i = 0; i < n; i++) if (p[i] != value) return 0;
    return 1;
}
static unsigned char * new(void) { void * p; if (posix_memalign(&p, 64, n)) abort(); return p; }
void * (*volatile zero)(void *, int, size_t) = memset;
int llama_decode(void * p) { return p != 0; }
const char * name = "cache_k_l%d";
int main(int count, char ** words) {
    unsigned char * p = new();
    zero(p, 0, n);
    printf("%d ", resident());                       // nothing was touched
    for (size_t i = 0; i < n; i += 3 * 4096 + 7) p[i] = 1;
    zero(p, 0, n);
    printf("%d ", all(p, 0));                        // what was dirty is zero again
    zero(p, 7, n);
    printf("%d ", all(p, 7));
    free(p);
    p = new();
    zero(p, 0, n / 2 + 11);
    zero(p + n / 2 + 11, 0, n - n / 2 - 11);
    printf("%d ", all(p, 0));                        // in parts
    unsigned char * base = (unsigned char *) ((uintptr_t) p & ~4095ul);
    int fd = open(words[1], O_RDWR | O_TMPFILE, 0600);
    zero(p, 5, n); (void) !ftruncate(fd, n + 4096);
    for (size_t at = 0; at < n; at += 1 << 20) (void) !pwrite(fd, p, 1 << 20, at);
    mmap(base, n, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_FIXED, fd, 0);  // a file where the allocation was
    zero(p, 0, n - 4096);
    int same = 1;
    for (size_t i = 0; i < n - 4096; i++) same = same && p[i] == 0;
    printf("%d\n", same);
    return count - 2;
}
"""


def test_zeroing_a_fresh_buffer_touches_nothing_and_zero_is_always_zero(compiled, run, folder):
    program = compiled("zeroes", ZEROES, "-O1", "-rdynamic")
    alone = subprocess.run([program, str(folder)], capture_output=True, text=True, check=True).stdout.split()
    governed = run(str(program), str(folder))
    assert governed.returncode == 0, governed.stderr
    small, *same = governed.stdout.split()
    assert same == alone[1:] == ["1", "1", "1", "1"]
    assert int(alone[0]) >= 128
    assert int(small) <= 32


@pytest.mark.llama
@pytest.mark.slow
def test_a_static_llama_cpp_in_node_starts_small_and_says_the_same(demo_model, folder):
    if (node := shutil.which("node")) is None:
        pytest.skip("there is no node here")
    try:
        addon = node_addon()
    except Unavailable as error:
        pytest.skip(f"npm's static llama.cpp can't be had here: {error}")
    command = [node, str(HERE / "static_addon.js"), str(addon), str(demo_model)]

    def play(*before: str) -> dict:
        done = subprocess.run(
            [*before, *command], capture_output=True, text=True, check=True, timeout=PATIENCE_S
        )
        return json.loads(done.stdout.splitlines()[-1])

    plain, governed = play(), play(*PSI_KV, "exec", "--place", str(folder), "--")
    assert governed["at_start"] <= 0.3 * plain["at_start"]
    assert (governed["text"], governed["probs"]) == (plain["text"], plain["probs"])
