"""The hooks hand every call on to the function that its caller would reach without them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from psi_kv_governor.native.building import agent_path, compiler

PROGRAM = """
import _ctypes, ctypes, sys
for number in map(int, sys.argv[1:-1]):
    handle = _ctypes.dlopen(f"{sys.argv[-1]}/plugin{number}.so", 0)
    print(ctypes.CDLL(None, handle=handle).ask(), flush=True)
    _ctypes.dlclose(handle)
"""

PLUGIN = """
int llama_memory_seq_pos_max(void *, int);
int ask(void) { return llama_memory_seq_pos_max(0, 0); }
"""
LLAMA = """
__asm__(".text; .skip SKIP, 0xcc");  // in each it begins elsewhere
int llama_memory_seq_pos_max(void * m, int s) { return NUMBER; }
"""


def build(folder: Path, name: str, source: str, *more: str) -> None:
    (folder / f"{name}.c").write_text(source)
    command = [compiler(), "-shared", "-fPIC", folder / f"{name}.c", "-o", folder / f"{name}.so", *more]
    subprocess.run(command, check=True)


def test_a_library_that_lies_where_a_closed_one_lay_is_not_taken_for_it(tmp_path):
    """A host of plugins closes one with its llama.cpp and opens the next, which lies at the same place."""
    for number in range(1, 13):  # more than the agent knows at once
        source = LLAMA.replace("SKIP", f"{64 * number}")
        build(tmp_path, f"llama{number}", source, f"-DNUMBER={number}")
        needs = f"-L{tmp_path}", f"-l:llama{number}.so", f"-Wl,-rpath,{tmp_path}"
        build(tmp_path, f"plugin{number}", PLUGIN, *needs)
    order = [str(number) for number in [*range(1, 13), *range(1, 13)]]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *order, tmp_path],
        env={**os.environ, "LD_PRELOAD": str(agent_path())},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout.split(), done.stderr) == (0, order, "")
