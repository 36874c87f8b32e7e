#!/usr/bin/env bash
# Lint, types and all tests of `make test`: run_tests.sh PYTHON WORKERS.
#
# What makes pressure comes first, one test after the other: the whole machine sees it. It waits much, and lint, tests that
# look neither at the machine's memory nor at its pressure, and the environments of others and their tests fill what it
# leaves of the processors, and later what the main part leaves: niced, so that they hold nothing up. Their output is shown
# when they are done. In the main part many tests wait, for a child, a server or the kernel, so there are more workers than
# cores. WORKERS=0: all of it one after the other.
set -euo pipefail

python=$1 workers=$2
log=.venv/other-environments.log
lint_log=.venv/lint-and-beside.log
alone='cgroup or swap'
beside=(tests/control tests/docs tests/engines/vllm tests/packaging tests/policy)
set_up=.venv/.set-up-for-tests
failed=0
background=()

others() { # the environment of transformers has no need of the rest of .venv: it is begun meanwhile
  make --no-print-directory begin-transformers
  until [ -e "$1" ]; do sleep 1; done
  make --no-print-directory --jobs=2 --output-sync=recurse test-others
}

lint_and_beside() { # PYTHON and what pytest is told
  local failed=0
  make --no-print-directory lint || failed=1
  "$1" -m pytest "${@:2}" || failed=1
  return "$failed"
}

finish() { # the one in the background whose output is in $2
  wait "$1" || failed=1
  cat "$2"
}

trap 'exit 130' INT TERM
if [ "$workers" = 0 ]; then
  make --no-print-directory model
  make --no-print-directory lint || failed=1
  "$python" -m pytest -m "$alone" || failed=1
  "$python" -m pytest -m "not ($alone)" || failed=1
  make --no-print-directory test-others || failed=1
  exit "$failed"
fi
trap 'for group in "${background[@]}"; do kill -- "-$group" 2>/dev/null || true; done' EXIT
# Each a group of its own, to be ended whole; the environments side by side, each one's output in one piece.
make --no-print-directory "$python"
rm -f "$set_up"
export -f others lint_and_beside
setsid nice -n 10 bash -c "others $set_up" >"$log" 2>&1 &
background+=($!)
make --no-print-directory model
touch "$set_up"
setsid nice -n 5 bash -c 'lint_and_beside "$@"' . "$python" -m "not ($alone)" "${beside[@]}" >"$lint_log" 2>&1 &
background+=($!)
"$python" -m pytest -m "$alone" || failed=1
"$python" -m pytest -n "$workers" --dist loadfile --no-loadscope-reorder -m "not ($alone)" "${beside[@]/#/--ignore=}" \
  || failed=1
echo "lint, and what was tested beside the first part:"
finish "${background[1]}" "$lint_log"
echo "the environments of frameworks and transformers:"
finish "${background[0]}" "$log"
exit "$failed"
