#!/usr/bin/env bash
# Builds the wheels of Linux on x86-64 and aarch64 into dist/, the agent compiled for glibc 2.17 and later.
# Called by `make wheel`, which installs what it needs.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${PYTHON:-.venv/bin/python}
work=build/wheels
out=${OUT:-dist}
rm -rf "$work"
mkdir -p "$work"
for machine in x86_64 aarch64; do
  compiler="$python -m ziglang cc -target $machine-linux-gnu.2.17"
  # The agent's locks are opened when an exception of llama.cpp passes them: by libgcc_s, which llama.cpp
  # itself brings. For -lgcc_s Zig would put an unwinder of its own into the agent, a second one in the
  # process: so it links with a library that has nothing of libgcc_s but the names.
  stub=$work/$machine
  mkdir -p "$stub"
  echo 'void __gcc_personality_v0(void) {} void _Unwind_Resume(void) {}' >"$stub/names.c"
  $compiler -shared -fPIC -Wl,-soname,libgcc_s.so.1 -o "$stub/names.so" "$stub/names.c"
  PSIKV_PLATFORM=linux_$machine CC="$compiler $stub/names.so -Wl,-z,defs" \
    "$python" -m build --wheel --outdir "$work" .
  PATH="$(cd "$(dirname "$python")" && pwd):$PATH" \
    "$python" -m auditwheel repair --plat auto --wheel-dir "$out" "$work"/*-linux_"$machine".whl
done
ls -l "$out"
