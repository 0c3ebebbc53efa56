"""One call of an operator, forward and backward, for tools that look at a single process: compute-sanitizer, ncu.

``python tools/one_call.py BACKEND OPERATOR [--large]``; the numbers are checked as `velm check` does it. ``--large`` is
cross-attention alone, at the size of Llama 3.2 Vision, timed by whoever profiles between the profiler's marks.
"""

from __future__ import annotations

import argparse
import contextlib
import sys

import torch

import velm_kernels
from velm_kernels import cases
from velm_kernels.cli import check


def large(backend: str, device: str) -> int:
    query = torch.randn(4, 32, 256, 128, device=device, dtype=torch.bfloat16)
    key, value = (torch.randn(4, 8, 1601, 128, device=device, dtype=torch.bfloat16) for _ in range(2))
    marks = torch.cuda.profiler.profile() if device == "cuda" else contextlib.nullcontext()
    with velm_kernels.use_backend(backend), torch.no_grad():
        velm_kernels.cross_attention(query, key, value)
        if device == "cuda":
            torch.cuda.synchronize()
        with marks:
            out = velm_kernels.cross_attention(query, key, value)
            # Before the mark: what is launched is not yet done.
            finite = bool(out.isfinite().all())
    print(f"cross_attention of {tuple(query.shape)} over {key.shape[2]} keys: {'finite' if finite else 'NOT FINITE'}")
    return 0 if finite else 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("backend")
    parser.add_argument("operator")
    parser.add_argument("--large", action="store_true")
    args = parser.parse_args()
    device = "cuda" if args.backend in ("cuda", "triton") else "cpu"
    if args.large:
        return large(args.backend, device)
    chosen = cases.of(args.operator)
    if not chosen:
        parser.error(f"operator: expected one of {', '.join(sorted({case.operator for case in cases.every()}))}")
    target = check.Target(args.backend, device=device)
    results = [check.run_case(chosen[0], dtype, target) for dtype in (torch.float32, torch.bfloat16)]
    for result in results:
        print(f"{result.status}: {result} {result.error:.1e}")
    return 0 if all(result.status == "passed" for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
