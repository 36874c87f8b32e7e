#!/usr/bin/env bash
# Builds llama-cpp-python from source for this machine, compiles the agent, and ends with what `psi-kv doctor`
# proves on a real model.
set -euo pipefail

usage() {
  cat <<'EOF'
usage: scripts/build_llama_runner.sh [--cpu | --cuda | --vulkan] [--model FILE]

Builds llama-cpp-python from source into the active virtual environment (else ./.venv), compiles the native
agent, and runs `psi-kv doctor`. An installed llama-cpp-python is replaced.

  --cpu         for this processor's instructions (default; about 8 minutes on 2 cores)
  --cuda        for NVIDIA GPUs; needs the CUDA toolkit (nvcc)
  --vulkan      for any GPU with Vulkan; needs its headers and glslc
  --model FILE  the model that is tried (default: the demo model, fetched when absent)
  -h, --help    this text

More for CMake goes in CMAKE_ARGS, the C compiler in CC, the number of jobs in CMAKE_BUILD_PARALLEL_LEVEL.

example: CMAKE_BUILD_PARALLEL_LEVEL=4 scripts/build_llama_runner.sh --cuda
EOF
}

fail() { # <exit status> <line>
  echo "build_llama_runner: $2" >&2
  exit "$1"
}

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
backend=""
model=""

choose() {
  [[ -z $backend || $backend == "$1" ]] || fail 2 "choose one of --$backend and --$1"
  backend=$1
}

while (($#)); do
  case $1 in
    --cpu | --cuda | --vulkan) choose "${1#--}" ;;
    --model)
      (($# >= 2)) || fail 2 "--model needs a file"
      model=$2
      shift
      ;;
    --model=*) model=${1#--model=} ;;
    -h | --help)
      usage
      exit 0
      ;;
    *) fail 2 "unknown option $1 (see --help)" ;;
  esac
  shift
done
backend=${backend:-cpu}

# -- what must be there beforehand ------------------------------------------------------------------------

if [[ -n ${VIRTUAL_ENV:-} ]]; then
  python=$VIRTUAL_ENV/bin/python
else
  python=$root/.venv/bin/python
fi
[[ -x $python ]] || fail 1 "there is no virtual environment: run 'make setup', or activate yours"
export PYTHONPATH=$root/src${PYTHONPATH:+:$PYTHONPATH}
"$python" -c 'import psi_kv_governor.cli.doctor' 2>/dev/null \
  || fail 1 "$python lacks this package's dependencies: run 'make setup', or '$python -m pip install -e $root'"
"$python" -m pip --version >/dev/null 2>&1 || fail 1 "$python has no pip: run '$python -m ensurepip'"
[[ -z $model || -f $model ]] || fail 2 "there is no model $model"

has() { command -v "$1" >/dev/null; }

needs_cpu() {
  [[ -n ${CC:-} ]] || has cc || has gcc || has clang \
    || fail 1 "there is no C compiler: install one, e.g. 'apt install gcc libc6-dev'"
  [[ -n ${CXX:-} ]] || has c++ || has g++ || has clang++ \
    || fail 1 "there is no C++ compiler: install one, e.g. 'apt install g++'"
}

needs_cuda() {
  needs_cpu
  [[ -n ${CUDACXX:-} ]] || has nvcc || [[ -x ${CUDA_HOME:-/usr/local/cuda}/bin/nvcc ]] \
    || fail 1 "there is no nvcc: install the CUDA toolkit, or say CUDACXX=/path/to/nvcc"
}

needs_vulkan() {
  local folder
  needs_cpu
  has glslc || [[ -x ${VULKAN_SDK:-/nowhere}/bin/glslc ]] \
    || fail 1 "there is no glslc: install it, e.g. 'apt install glslc', or set VULKAN_SDK"
  for folder in ${VULKAN_SDK:+"$VULKAN_SDK/include"} /usr/include /usr/local/include; do
    [[ ! -f $folder/vulkan/vulkan.h ]] || return 0
  done
  fail 1 "there are no Vulkan headers: install them, e.g. 'apt install libvulkan-dev', or set VULKAN_SDK"
}

"needs_$backend"

# -- build ------------------------------------------------------------------------------------------------

declare -A switches=([cpu]=-DGGML_NATIVE=ON [cuda]=-DGGML_CUDA=ON [vulkan]=-DGGML_VULKAN=ON)
wanted=$(sed -n 's/^llama = \["\([^"]*\)"\].*/\1/p' "$root/pyproject.toml")
[[ -n $wanted ]] || fail 1 "pyproject.toml names no version of llama-cpp-python"
if [[ -x ${CUDA_HOME:-/usr/local/cuda}/bin/nvcc ]] && ! has nvcc; then
  export CUDACXX=${CUDACXX:-${CUDA_HOME:-/usr/local/cuda}/bin/nvcc}
fi
export CMAKE_ARGS="${switches[$backend]} ${CMAKE_ARGS:-}"

echo "building $wanted for $backend ($CMAKE_ARGS); this takes minutes, with a GPU up to half an hour"
"$python" -m pip install --disable-pip-version-check --force-reinstall --no-cache-dir --no-deps \
  --no-binary llama-cpp-python "$wanted"
"$python" -m pip install --disable-pip-version-check --quiet "$wanted" # and what it depends on

# -- prove ------------------------------------------------------------------------------------------------

if [[ -z $model ]]; then
  "$python" -m psi_kv_governor.cli model fetch
  model=$("$python" -m psi_kv_governor.cli model path)
fi
echo "compiling the agent, and proving each step on $model"
"$python" -m psi_kv_governor.cli doctor --model "$model" \
  || fail 1 "what failed, and what to do, stands above"
