"""What of a program is reached is known before it is started."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from servers import PSI_KV

from psi_kv_governor.service.reach import Level, reach_of

LLAMA = """
int llama_decode(void * ctx) { return ctx != 0; }
const char * name = "cache_k_l%d";
"""
MAIN = "int llama_decode(void *); int main(void) { return llama_decode(0); }"


@pytest.fixture
def library(compiled) -> Path:
    return compiled("libllama.so", LLAMA, "-shared", "-fPIC", "-Wl,-soname,libllama.so")


@pytest.fixture
def program(compiled, library):
    def program_(name: str = "server", *flags: str) -> Path:
        return compiled(name, MAIN, str(library), f"-Wl,-rpath,{library.parent}", *flags)

    return program_


def test_a_program_with_a_shared_llama_cpp_is_reached_whole(program, library):
    reach = reach_of(program())
    assert reach.level is Level.FULL
    assert str(library) in reach.how


def test_one_that_is_bound_to_itself_is_not(compiled, program):
    program()
    compiled("libllama.so", LLAMA, "-shared", "-fPIC", "-Wl,-soname,libllama.so", "-Wl,-Bsymbolic")
    reach = reach_of(program())
    assert reach.level is Level.PAGED
    assert "-Bsymbolic" in reach.how


def test_a_library_that_is_missing_is_named(program, library):
    made = program()
    library.unlink()
    reach = reach_of(made)
    assert reach.level is Level.NONE
    assert "libllama.so" in reach.how


@pytest.mark.parametrize("flags", [(), ("-rdynamic",)])
def test_a_llama_cpp_that_is_linked_into_the_program_is_paged_on_demand(compiled, flags):
    """Also where it exports its own symbols: it calls itself by address."""
    reach = reach_of(compiled("whole", LLAMA + MAIN, *flags))
    assert reach.level is Level.PAGED
    assert "C library" in reach.how
    assert "BUILD_SHARED_LIBS" in reach.remedy


def test_a_static_program_is_not_reached(compiled):
    reach = reach_of(compiled("static", LLAMA + MAIN, "-static"))
    assert reach.level is Level.CHILDREN
    assert "statically" in reach.how


def test_a_program_for_musl_is_not_reached(compiled):
    loader = "-Wl,--dynamic-linker=/lib/ld-musl-x86_64.so.1"  # by which alone it is known
    reach = reach_of(compiled("for-musl", "int main(void) { return 0; }", loader))
    assert reach.level is Level.NONE
    assert "musl" in reach.how


def test_a_go_program_is_passed_over_for_what_it_starts(compiled, tmp_path):
    made = compiled("plain", "int main(void) { return 0; }")
    (tmp_path / "id").write_bytes(b"go1.24")
    subprocess.run(["objcopy", "--add-section", f".go.buildinfo={tmp_path / 'id'}", str(made)], check=True)
    reach = reach_of(made)
    assert reach.level is Level.CHILDREN
    assert "Go" in reach.how


def test_another_program_is_reached_as_soon_as_it_opens_a_llama_cpp():
    assert reach_of(Path("/bin/ls")).level is Level.LATER


def test_a_script_is_judged_by_its_interpreter(program, tmp_path):
    made = program()
    script = tmp_path / "script"
    script.write_text(f"#!{made}\n")
    assert reach_of(script).level is Level.FULL


def test_a_script_that_names_itself_ends(tmp_path):
    script = tmp_path / "script"
    script.write_text(f"#!{script}\n")
    script.chmod(0o755)
    assert reach_of(script).level is Level.LATER


@pytest.mark.llama
def test_of_a_python_its_packages_are_named():
    reach = reach_of(Path(sys.executable))
    assert reach.level is Level.LATER
    assert "llama_cpp/lib/libllama.so" in reach.how


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can act as another user")
def test_file_capabilities_are_told_to_whom_they_matter(tmp_path):
    if shutil.which("setcap") is None or shutil.which("setpriv") is None:
        pytest.skip("there is no setcap here")
    made = tmp_path / "locks"
    shutil.copy("/bin/true", made)
    subprocess.run(["setcap", "cap_ipc_lock+ep", str(made)], check=True)
    assert reach_of(made).level is Level.LATER  # of root the loader takes a preload


@pytest.mark.parametrize(
    "content",
    [b"", b"\x7fELF", b"\x7fELF" + bytes(60), os.urandom(4096), b"#!", b"#!\n", b"#!/usr/bin/env\n"],
)
def test_nothing_that_a_file_may_hold_raises(tmp_path, content):
    (tmp_path / "file").write_bytes(content)
    assert reach_of(tmp_path / "file").how


def test_the_doctor_tells_it(program):
    done = subprocess.run(
        [*PSI_KV, "doctor", "--json", "--", str(program())], capture_output=True, text=True, check=True
    )
    (check,) = json.loads(done.stdout)["checks"]
    assert check["state"] == "ok"
    assert "libllama.so" in check["detail"]
