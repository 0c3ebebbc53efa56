"""The operator weighted_rows: sums of a few rows of a table with weights, the same ones for every entry of a batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from velm_kernels.backends import Arguments
from velm_kernels.layout import unit_last_stride
from velm_kernels.operator import Operator
from velm_kernels.pooling.weighted_rows.reference import weighted_rows


def _gradients(a: Any, wanted: Sequence[bool]) -> tuple[Tensor | None, Tensor | None]:
    of_x, of_weights = wanted
    live, (batch, _, dim) = a.indices >= 0, a.grad.shape
    grad_x = grad_weights = None
    if of_x:
        # One row more, for taps of none.
        grad_x = a.grad.new_zeros(batch, a.rows + 1, dim)
        terms = a.grad[:, :, None] * a.weights.masked_fill(~live, 0.0)[..., None]
        row = torch.where(live, a.indices, a.rows).reshape(-1).long()
        grad_x = grad_x.index_add(1, row, terms.flatten(1, 2))[:, : a.rows]
    if of_weights:
        x = a.x if a.rows else a.x.new_zeros(batch, 1, dim)
        taken = x[:, a.indices.clamp(min=0).long()].masked_fill(~live[..., None], 0.0)
        grad_weights = (a.grad[:, :, None] * taken).sum((0, 3)).masked_fill(~live, 0.0)
    return grad_x, grad_weights


def _too_many(arguments: Arguments) -> list[str]:
    x, taps = arguments["x"], arguments["indices"].numel()
    rows = arguments["rows"] if x is None else x.shape[1]
    return [] if max(rows, taps) < 2**31 else [f"there are {rows} rows and {taps} taps, and kernels count in 32 bits"]


# x: (batch, rows, dim), last stride 1, other strides arbitrary. indices: (n, taps) int32, rows of x, or -1 for nothing;
# weights: (n, taps) float32 (float64 with x in float64); contiguous. The result is contiguous, sums are float32.
OPERATOR = Operator(
    "weighted_rows",
    "Tensor x, Tensor indices, Tensor weights",
    shapes=lambda a: a.x.new_empty((a.x.shape[0], a.indices.shape[0], a.x.shape[2])),
    reference=weighted_rows,
    differentiable=("x", "weights"),
    saves={"x": ("indices", "weights"), "weights": ("x", "indices")},
    remembers={"SymInt rows": lambda a: a.x.shape[1]},
    gradients=_gradients,
    gradient_shapes={
        "x": lambda a: a.grad.new_empty((a.grad.shape[0], a.rows, a.grad.shape[2])),
        "weights": lambda a: a.grad.new_empty(a.indices.shape, dtype=weights_dtype(a.grad)),
    },
    incoming=lambda grad, a: unit_last_stride(grad),
    triton="pooling.weighted_rows.triton",
    cuda=False,
    reasons=dict.fromkeys(("cpu", "triton"), _too_many),
    flops=lambda a: 2 * a.x[0] * a.x[2] * a.indices[0] * a.indices[1],
    backward_flops=lambda a: 4 * a.grad[0] * a.grad[2] * a.indices[0] * a.indices[1],
)


def weights_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
