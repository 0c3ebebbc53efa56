#!/usr/bin/env bash
# The first ten minutes on a GPU: does it build, are the numbers right, how fast is it? Needs neither pip nor a network:
# python3 (3.10 or newer) with torch (2.10 or newer), and nvcc or a library that was built elsewhere and carried along in
# velm_kernels/_lib. What else is there is used; what is missing is named.
#
#   make gpu                      or tools/first_gpu_run.sh
#   make gpu DEVICE=cpu           rehearses it with the CPU backends
#   make gpu STEPS="build check"  some of the steps: environment build check sanitizer benchmark ncu tests
#
# OUT (default out/gpu) receives one text file for each step while it runs, steps.tsv, and summary.txt, which is written
# anew after every step, what failed first. A failing step does not stop the others; the exit status is 1 if one failed.
# CARRIED=1 takes a library that is here however old it is, REBUILD=1 builds in any case.
# LIMIT (default 580) are the seconds that everything may take, and no step takes more than its own limit.
set -u
cd "$(dirname "$0")/.." || exit 1
ROOT=$PWD
DEVICE=${DEVICE:-cuda}
OUT=${OUT:-out/gpu}
STEPS=${STEPS:-environment build check sanitizer benchmark ncu tests}
LIMIT=${LIMIT:-580}
JOBS=${JOBS:-$(nproc)}
export DEVICE JOBS
export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
case $DEVICE in cuda | cpu) ;; *)
  echo "DEVICE: expected cuda or cpu, given $DEVICE" >&2
  exit 2
  ;;
esac

mkdir -p "$OUT" || exit 1
OUT=$(cd "$OUT" && pwd)
export OUT
rm -rf "$OUT"/steps.tsv "$OUT"/check
: > "$OUT/steps.tsv"
for folder in "${CUDA_HOME:-}" /usr/local/cuda; do
  if [ -n "$folder" ] && [ -d "$folder/bin" ]; then PATH="$PATH:$folder/bin"; fi
done
for folder in /opt/nvidia/nsight-compute/*/; do
  if [ -x "$folder/ncu" ]; then PATH="$PATH:$folder"; fi
done

has() { command -v "$1" > /dev/null 2>&1; }
imports() { "$PYTHON" -c "import $1" > /dev/null 2>&1; }
wanted() { case " $STEPS " in *" $1 "*) true ;; *) false ;; esac; }
left() { echo $((LIMIT - SECONDS)); }

# record NAME ok|failed|skipped SECONDS WHAT
record() {
  printf '%s\t%s\t%s\t%s\n' "$@" >> "$OUT/steps.tsv"
  printf '%-28s %-8s %4s s  %s\n' "$@"
  summary
}

# step NAME SECONDS COMMAND...: runs it with its output in OUT/NAME.txt, for so many seconds at the most.
step() {
  local name=$1 limit=$2 begin=$SECONDS status note=""
  shift 2
  if [ "$(left)" -lt 5 ]; then
    record "$name" skipped 0 "the $LIMIT s of LIMIT are over"
    return 1
  fi
  if [ "$limit" -gt "$(left)" ]; then limit=$(left); fi
  timeout --kill-after=5 "$limit" "$@" > "$OUT/$name.txt" 2>&1 < /dev/null
  status=$?
  case $status in
    0) ;;
    124 | 137) note="stopped after $limit s; " ;;
    *) note="exit status $status; " ;;
  esac
  if [ $status -eq 0 ]; then
    record "$name" ok $((SECONDS - begin)) "$(tail -n 1 "$OUT/$name.txt" | cut -c 1-100)"
  else
    record "$name" failed $((SECONDS - begin)) "$note$(grep . "$OUT/$name.txt" | tail -n 1 | cut -c 1-100)"
  fi
  return $status
}

summary() {
  {
    echo "velm_kernels on $DEVICE, $(date -u '+%Y-%m-%d %H:%M UTC'), commit $(git rev-parse --short HEAD 2> /dev/null || echo unknown)"
    [ -f "$OUT/environment.txt" ] && sed -n 's/^summary: //p' "$OUT/environment.txt"
    echo
    for state in failed skipped ok; do
      while IFS=$'\t' read -r name is seconds what; do
        if [ "$is" = $state ]; then printf '%-8s %-28s %4s s  %s\n' "$is" "$name" "$seconds" "$what"; fi
      done < "$OUT/steps.tsv"
    done
    while IFS=$'\t' read -r name is _; do
      # All of check.txt stands below.
      if [ "$is" = failed ] && [ "$name" != check ] && [ -f "$OUT/$name.txt" ]; then
        printf '\n-- %s.txt, its last lines\n' "$name"
        tail -n 12 "$OUT/$name.txt" | cut -c 1-300
      fi
    done < "$OUT/steps.tsv"
    for log in "$OUT"/check/*.txt; do
      if grep -q '^FAILED' "$log" 2> /dev/null; then
        printf '\n-- check/%s, what failed\n' "$(basename "$log")"
        grep '^FAILED' "$log" | head -n 6 | cut -c 1-300
      fi
    done
    if [ -f "$OUT/check.txt" ]; then
      printf '\n-- checks: seconds, exit status, backend, operator, result\n'
      cat "$OUT/check.txt"
    fi
    if [ -f "$OUT/benchmark.txt" ]; then
      printf '\n-- benchmark.txt\n'
      cat "$OUT/benchmark.txt"
    fi
  } > "$OUT/summary.new"
  mv "$OUT/summary.new" "$OUT/summary.txt"
}

# The first interpreter that has torch.
for PYTHON in ${PYTHON:+"$PYTHON"} .venv/bin/python python3 python; do
  if has "$PYTHON" && imports torch; then break; fi
  PYTHON=""
done
if [ -z "$PYTHON" ]; then
  PYTHON=python3
  record python failed 0 "no python with torch was found; PYTHON=/path/to/python names one"
  exit 1
fi
export PYTHON

if wanted environment && ! step environment 60 bash tools/environment.sh; then
  echo "nothing else is tried: $OUT/environment.txt says why" >&2
  exit 1
fi

if wanted build; then
  if carried=$("$PYTHON" tools/carried_library.py "$DEVICE" 2>&1) &&
    [ -z "${REBUILD:-}" ]; then
    record build skipped 0 "$carried"
  elif [ "$DEVICE" = cuda ] && ! has nvcc; then
    record build failed 0 "no nvcc here, and ${carried:-no library}"
  else
    step build "${LIMIT_BUILD:-300}" bash tools/build_here.sh
  fi
fi

if wanted check; then
  step check "${LIMIT_CHECK:-200}" bash tools/check_in_parallel.sh
fi

if wanted sanitizer; then
  for operator in gated_residual masked_pool cross_attention; do
    if [ "$DEVICE" = cpu ] || ! has compute-sanitizer; then
      record "sanitizer-$operator" skipped 0 "$([ "$DEVICE" = cpu ] && echo 'needs a GPU' || echo 'no compute-sanitizer here')"
    else
      # Each tensor in an allocation of its own, so that what reads past one is seen.
      PYTORCH_NO_CUDA_MEMORY_CACHING=1 step "sanitizer-$operator" "${LIMIT_SANITIZER:-60}" \
        compute-sanitizer --error-exitcode 9 "$PYTHON" tools/one_call.py cuda "$operator"
    fi
  done
fi

if wanted benchmark; then
  arguments=(--device "$DEVICE" --no-compile --no-memory --out "$OUT/bench")
  if [ -n "${BENCH_ARGS:-}" ]; then
    read -r -a more <<< "$BENCH_ARGS"
  elif [ "$DEVICE" = cuda ]; then
    more=(--dtype bf16 --rounds 5 --family attention --family pooling --family fusion --family linear)
  else
    more=(--dtype fp32 --rounds 1 --family attention --case q-former --direction fwd)
  fi
  step benchmark "${LIMIT_BENCHMARK:-150}" "$PYTHON" -m benchmarks "${arguments[@]}" "${more[@]}"
fi

if wanted ncu; then
  if [ "$DEVICE" = cpu ] || ! has ncu; then
    record ncu skipped 0 "$([ "$DEVICE" = cpu ] && echo 'needs a GPU' || echo 'no ncu here')"
  else
    step ncu "${LIMIT_NCU:-60}" ncu --set full --profile-from-start off --launch-count 1 \
      "$PYTHON" tools/one_call.py cuda cross_attention --large
  fi
fi

if wanted tests; then
  if ! imports pytest || ! imports hypothesis; then
    record tests skipped 0 "pytest or hypothesis is not installed"
  else
    export VELM_TEST_EXAMPLES=${VELM_TEST_EXAMPLES:-5}
    if [ "$DEVICE" = cuda ]; then chosen=(tests -k "cuda-device or triton-device"); else chosen=(tests/attention/test_gated_residual.py -k reference); fi
    step tests "${LIMIT_TESTS:-300}" "$PYTHON" -m pytest -q --no-header -p no:cacheprovider "${chosen[@]}"
  fi
fi

echo "summary in $OUT/summary.txt"
! cut -f 2 "$OUT/steps.tsv" | grep -qx failed
