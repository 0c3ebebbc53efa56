#!/usr/bin/env bash
# Builds the library of DEVICE for what this machine has, into the source tree: by CMake, else without it.
set -eu
cmake_is_new() {
  command -v cmake > /dev/null &&
    cmake --version | sed -n 's/^cmake version \([0-9]*\)\.\([0-9]*\).*/\1 \2/p' |
    while read -r major minor; do [ "$major" -gt 3 ] || [ "$minor" -ge 25 ]; done
}
generator=(-G Ninja)
if ! command -v ninja > /dev/null; then generator=(); fi
architectures=$(tools/gpu_architectures.sh)
# Named, because what was configured last stays in force.
options=(-DVELM_TESTING=OFF -DVELM_CPU_ISAS=native -DVELM_CUDA_SMALL=OFF)
build=build/gpu-${DEVICE:=cuda}
if ! cmake_is_new; then
  if [ "$DEVICE" != cuda ]; then
    echo "CMake 3.25 or newer is needed to build the CPU library"
    exit 1
  fi
  exec "$PYTHON" tools/build_cuda.py --archs "${architectures:-80}" --jobs "$JOBS"
fi
if [ "$DEVICE" = cuda ]; then
  options+=(-DVELM_BUILD_CUDA=1 "-DVELM_CUDA_ARCHS=${architectures:-80}")
  target=(--target velm_cuda)
else
  options+=(-DVELM_BUILD_CUDA=0)
  target=()
fi
cmake -S . -B "$build" "${generator[@]}" -DPython_EXECUTABLE="$("$PYTHON" -c 'import sys; print(sys.executable)')" "${options[@]}"
cmake --build "$build" --parallel "$JOBS" "${target[@]}"
"$PYTHON" tools/carried_library.py "$DEVICE"
