#!/usr/bin/env bash
# All tests of `make test`: run_tests.sh PYTHON WORKERS.
#
# Many tests wait, for a child, a server or the kernel, so there are more workers than cores. What makes pressure has a
# turn of its own. The environments of others are made and tested meanwhile with what time is left over: niced, so that
# they hold nothing up, and their output is shown at the end. WORKERS=0: all of it one after the other.
set -euo pipefail

python=$1 workers=$2
log=.venv/other-environments.log
alone='cgroup or swap'
failed=0 others=

trap 'exit 130' INT TERM
if [ "$workers" != 0 ]; then
  # Side by side, each one's output in one piece; a group of its own, to be ended whole.
  setsid nice -n 10 make --no-print-directory --jobs=2 --output-sync=recurse test-others >"$log" 2>&1 &
  others=$!
  trap 'kill -- "-$others" 2>/dev/null || true' EXIT
fi
"$python" -m pytest -n "$workers" --dist loadfile --no-loadscope-reorder -m "not ($alone)" || failed=1
"$python" -m pytest -m "$alone" || failed=1
if [ -z "$others" ]; then
  make --no-print-directory test-others || failed=1
else
  echo "the environments of frameworks and transformers:"
  wait "$others" || failed=1
  cat "$log"
fi
exit "$failed"
