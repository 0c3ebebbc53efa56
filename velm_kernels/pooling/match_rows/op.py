"""The operator match_rows: rows against rows, by their angles."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from velm_kernels.backends import Arguments
from velm_kernels.operator import Operator
from velm_kernels.pooling.match_rows.reference import match_rows


def _shapes(v: Any) -> tuple[Tensor, Tensor]:
    shape, compute_dtype = v.a.shape[:2], torch.promote_types(v.a.dtype, torch.float32)
    return v.a.new_empty(shape, dtype=compute_dtype), v.a.new_empty(shape, dtype=torch.int32)


def _too_many(arguments: Arguments) -> list[str]:
    rows = max(arguments["a"].shape[1], arguments["b"].shape[1])
    # On the CPU numbers of rows are held as float32.
    return [] if rows <= 2**24 else [f"there are {rows} rows, and kernels take 2^24"]


# a: (batch, rows, dim), b: (batch, columns, dim), one dtype, last stride 1, other strides arbitrary. For each row of a
# the largest cosine of its angle to a row of b, (batch, rows) float32 (float64 for float64), and the first row of b
# that has it, (batch, rows) int32. The angle to a row of zeros has cosine 0; NaN is never the largest, and -inf, with
# any row of b, stands where there is nothing else. Not differentiable.
OPERATOR = Operator(
    "match_rows",
    "Tensor a, Tensor b",
    results=("similarity", "best"),
    shapes=_shapes,
    reference=match_rows,
    triton="pooling.match_rows.triton",
    reasons=dict.fromkeys(("cpu", "cuda", "device_on_host", "triton"), _too_many),
    flops=lambda v: 2 * v.a[0] * v.a[1] * v.b[1] * v.a[2],
)
