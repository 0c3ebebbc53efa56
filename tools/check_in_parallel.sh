#!/usr/bin/env bash
# `velm check`, one process for each operator and backend of DEVICE, JOBS at once, each with its output in OUT/check and
# LIMIT_ONE_CHECK (default 150) seconds at the most: a kernel that hangs, or leaves its device unusable, takes no other
# with it. CHECK_OPERATORS names some operators, CHECK_BACKENDS backends.
set -u
mkdir -p "$OUT/check"
export JOBS=${JOBS:-$(nproc)} LIMIT_ONE_CHECK=${LIMIT_ONE_CHECK:-150} OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
default="cuda triton torch"
if [ "$DEVICE" = cpu ]; then default=cpu; fi
pairs=$("$PYTHON" - ${CHECK_BACKENDS:-$default} << 'PYTHON_PROGRAM'
import os
import sys

from velm_kernels import backends, cases

wanted = os.environ.get("CHECK_OPERATORS", "").split()
for operator in dict.fromkeys(case.operator for case in cases.every()):
    public = backends._public_functions.get(operator)
    for backend in sys.argv[1:]:
        if wanted and operator not in wanted:
            continue
        # What is not in the table is made of other operators.
        if public is None or backend in backends._implementations[public.operator]:
            print(backend, operator)
PYTHON_PROGRAM
) || exit 1

one() {
  local log="$OUT/check/$1-$2.txt" begin=$SECONDS status
  # In the foreground: in a group of its own it would outlive the step that is stopped.
  timeout --foreground --kill-after=5 "$LIMIT_ONE_CHECK" "$PYTHON" -m velm_kernels check --why --backend "$1" --operator "$2" \
    > "$log" 2>&1 < /dev/null
  status=$?
  case $status in 124 | 137) echo "FAILED stopped after $LIMIT_ONE_CHECK s" >> "$log" ;; esac
  printf '%4s s  %3s  %-8s %-26s %s\n' $((SECONDS - begin)) $status "$1" "$2" "$(grep . "$log" | tail -n 1 | cut -c 1-120)"
  echo "$1-$2 $status" >> "$OUT/check/statuses"
  return $status
}
export -f one
echo "$(echo "$pairs" | wc -l) to run, $JOBS at once"
echo "$pairs" | xargs -P "$JOBS" -L 1 bash -c 'one "$@" || exit 1' _
status=$?
failed=$(grep -vc ' 0$' "$OUT/check/statuses")
echo "$(wc -l < "$OUT/check/statuses") of $(echo "$pairs" | wc -l) ran, $failed with failures"
[ $status -eq 0 ]
