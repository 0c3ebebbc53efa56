"""Is the library for a device here already? ``carried_library.py cuda|cpu``: prints what there is, or exits with 1 and
says what is missing."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

import velm_kernels
from velm_kernels.backends import cpu, cuda


def main(device: str) -> int:
    if device == "cpu":
        usable = cpu.usable()
        print(f"there are libraries for {', '.join(usable)}" if usable else "no CPU library is built")
        return 0 if usable else 1
    reason = why_not()
    print(reason or f"there is a library for sm_{cuda.build_info()['isa'].replace(',', ', sm_')}")
    return 1 if reason else 0


def why_not() -> str | None:
    build = cuda.build_info()
    if not build:
        return "no CUDA library is built"
    if build["version"] != velm_kernels.__version__:
        return f"the library that is here is of velm_kernels {build['version']}"
    sources = Path(__file__).parents[1] / "csrc"
    newest = max(sources.rglob("*.[ch]*"), key=lambda path: path.stat().st_mtime)
    if not os.environ.get("CARRIED") and newest.stat().st_mtime > cuda.library_path("cuda").stat().st_mtime:
        return f"the library that is here is older than {newest.relative_to(sources.parent)}"
    reason = cuda.why_not("cuda")
    if reason is not None:
        return f"the library that is here cannot be used: {reason}"
    for index in range(torch.cuda.device_count()):
        reason = cuda.why_not_on(index)
        if reason is not None:
            return f"the library that is here does not serve cuda:{index}: {reason}"
    return None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
