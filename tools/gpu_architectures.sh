#!/usr/bin/env bash
# Prints the architectures of the GPUs here, as VELM_CUDA_ARCHS takes them (80;90a), or nothing where there is no GPU
# that the kernels run on (compute capability 8.0 or newer).
nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2> /dev/null |
  sed -n 's/^ *\([0-9][0-9]*\)\.\([0-9]\) *$/\1\2/p' | sort -nu |
  while read -r arch; do
    # What is built for 90a has the instructions of Hopper that 90 leaves out.
    if [ "$arch" -eq 90 ]; then echo 90a; elif [ "$arch" -ge 80 ]; then echo "$arch"; fi
  done | paste -sd ';' -
