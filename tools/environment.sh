#!/usr/bin/env bash
# What tools/first_gpu_run.sh finds here. Fails where DEVICE is not there, so that nothing else is tried.
first() { echo "$1: $("$@" 2>&1 | head -n 1)"; }
uname -srm
nproc | sed 's/$/ processors/'
df -h . | tail -n 1
nvidia-smi 2>&1
command -v nvcc && nvcc --version | tail -n 2
for tool in g++ cmake ninja git; do
  if command -v "$tool" > /dev/null; then first "$tool" --version; else echo "$tool: not here"; fi
done
for tool in compute-sanitizer ncu; do echo "$tool: $(command -v "$tool" || echo not here)"; done
# Its exit status is about libraries, which are built next.
"$PYTHON" -m velm_kernels info || true
echo
"$PYTHON" - << 'PYTHON_PROGRAM'
import importlib.metadata
import os
import platform
import sys

import torch

names = ("triton", "rich", "transformers", "pytest", "hypothesis", "pybind11", "numpy", "flash_attn", "xformers")
for name in names:
    try:
        print(f"{name}: {importlib.metadata.version(name)}")
    except importlib.metadata.PackageNotFoundError:
        print(f"{name}: not installed")
print(f"summary: python {platform.python_version()}, torch {torch.__version__}, CUDA of torch {torch.version.cuda}")
if os.environ["DEVICE"] == "cuda":
    if not torch.cuda.is_available():
        sys.exit("torch sees no GPU (DEVICE=cpu rehearses without one)")
    for index in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(index)
        print(
            f"summary: cuda:{index} {found.name}, sm_{found.major}{found.minor}, "
            f"{found.multi_processor_count} multiprocessors, {found.total_memory / 2**30:.0f} GiB"
        )
if (sys.version_info < (3, 10)) or tuple(map(int, torch.__version__.split(".")[:2])) < (2, 10):
    sys.exit("velm_kernels needs Python 3.10 and torch 2.10 or newer")
PYTHON_PROGRAM
