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

# shellcheck disable=SC2317 # the trap calls it
end_background() {
  local group
  for group in "${background[@]}"; do
    kill -- "-$group" 2>/dev/null || true
  done
}

others() { # each environment's output in one piece; that of transformers has no need of .venv's rest and is begun at once
  make --no-print-directory begin-transformers
  until [ -e "$1" ]; do sleep 1; done
  make --no-print-directory --jobs=2 --output-sync=recurse test-others
}

lint_and_beside() {
  local failed=0
  make --no-print-directory lint || failed=1
  "$python" -m pytest -m "not ($alone)" "${beside[@]}" || failed=1
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
trap end_background EXIT
make --no-print-directory "$python"
rm -f "$set_up"
set -m # each in the background is a process group of its own, to be ended whole
{ renice -n 10 -p "$BASHPID" >/dev/null && others "$set_up"; } >"$log" 2>&1 </dev/null &
background+=($!)
set +m
make --no-print-directory model
touch "$set_up"
set -m
{ renice -n 5 -p "$BASHPID" >/dev/null && lint_and_beside; } >"$lint_log" 2>&1 </dev/null &
background+=($!)
set +m
"$python" -m pytest -m "$alone" || failed=1
"$python" -m pytest -n "$workers" --dist loadfile --no-loadscope-reorder -m "not ($alone)" "${beside[@]/#/--ignore=}" \
  || failed=1
renice -n 0 -g "${background[@]}" >/dev/null 2>&1 || true # they hold nothing up any more
echo "lint, and what was tested beside the first part:"
finish "${background[1]}" "$lint_log"
echo "the environments of frameworks and transformers:"
finish "${background[0]}" "$log"
exit "$failed"
