"""The operator gated_residual: rows of (rows, dim) plus tanh(gate) times others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from velm_kernels.attention.gated_residual.reference import gated_residual
from velm_kernels.layout import empty_like
from velm_kernels.operator import Operator


def meaning(residual: Tensor, x: Tensor, gate: Tensor, row_mask: Tensor | None) -> Tensor:
    dtype = torch.promote_types(residual.dtype, x.dtype)
    return gated_residual(residual.to(dtype), x.to(dtype), gate.to(dtype), row_mask)


def gradients(a: Any, wanted: Sequence[bool]) -> tuple[Tensor | None, Tensor | None]:
    of_x, of_gate = wanted

    def live(rows: Tensor) -> Tensor:
        return rows if a.row_mask is None else rows.masked_fill(~a.row_mask[:, None], 0.0)

    grad = live(a.grad)
    grad_x = live(torch.tanh(a.gate.to(grad.dtype)) * grad) if of_x else None
    if not of_gate:
        return grad_x, None
    products = grad * live(a.x)
    total = products.sum(0) if a.gate.numel() == grad.shape[1] else products.sum().view(1)
    # In float64, since 1 - tanh^2 cancels where the gate is wide open.
    return grad_x, (1 - torch.tanh(a.gate.double()).square()) * total


def _empty(a: Any) -> Tensor:
    residual, x = a.residual.dtype, a.x.dtype
    if residual == x:
        return empty_like(a.x)
    out: Tensor = a.x.new_empty(a.x.shape, dtype=torch.promote_types(residual, x))
    return out


# residual, x: (rows, dim), any row stride, last stride 1, dtypes of their own; gate: (1,) or (dim,) contiguous, a dtype
# of its own; row_mask: (rows,) bool contiguous. Out: (rows, dim) contiguous, the promoted dtype; the gradient of x
# contiguous in its dtype; that of the gate summed in float32 or better in an order that depends on the shape alone.
OPERATOR = Operator(
    "gated_residual",
    "Tensor residual, Tensor x, Tensor gate, Tensor? row_mask",
    shapes=_empty,
    reference=meaning,
    differentiable=("x", "gate"),
    passed_on=("residual",),
    saves={"x": ("gate", "row_mask"), "gate": ("x", "gate", "row_mask")},
    remembers={"ScalarType x_dtype": lambda a: a.x.dtype},
    gradients=gradients,
    gradient_shapes={"x": lambda a: a.grad.new_empty(a.grad.shape, dtype=a.x_dtype)},
    triton="attention.gated_residual.triton",
)
