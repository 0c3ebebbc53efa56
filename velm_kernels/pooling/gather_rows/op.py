"""The operator gather_rows: weighted sums of rows by index, with their transposed sums as gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from velm_kernels.backends import Arguments
from velm_kernels.backends.direct import ops
from velm_kernels.layout import unit_last_stride
from velm_kernels.operator import Operator
from velm_kernels.pooling.gather_rows.reference import gather_rows


def _shapes(a: Any) -> Tensor:
    rows = a.index.shape[1] if a.offsets is None else a.offsets.shape[1] - 1
    out: Tensor = a.x.new_empty((a.x.shape[0], rows, a.x.shape[2]))
    return out


def _backward(a: Any, wanted: Sequence[bool], backend: str) -> tuple[Tensor | None, Tensor | None]:
    """The same sums with the two sides exchanged."""
    of_x, of_weight = wanted
    grad_x = grad_weight = None
    entries, back = (a.index, a.offsets), (a.back_index, a.back_offsets)
    if of_x:
        grad_x = ops.gather_rows_forward(a.grad, *back, a.back_weight, *entries, a.weight, backend)
    if of_weight:
        spread = ops.gather_rows_forward(a.grad, *back, None, *entries, None, backend)
        grad_weight = (spread.to(a.back_weight.dtype) * a.x.to(a.back_weight.dtype)).sum(2)
    return grad_x, grad_weight


def _too_many(arguments: Arguments) -> list[str]:
    rows = max(arguments["x"].shape[1], arguments["index"].shape[1])
    return [] if rows < 2**31 else [f"there are {rows} rows, and kernels count them in 32 bits"]


_DESCRIPTION = ("index", "offsets", "weight", "back_index", "back_offsets", "back_weight")

# x: (batch, rows, dim), last stride 1, other strides arbitrary. index: (batch, entries) int32, rows of x, or -1 for
# nothing; offsets: (batch, rows of the result + 1) int32 rising from 0 to entries, or None for one entry each; weight:
# (batch, entries) float32 (float64 with x in float64), or None for 1; all contiguous. The result is contiguous, sums
# are float32. What back_index, back_offsets and back_weight say is the same with x and the result exchanged: kernels
# do not look at them, and backward is this operator with the two exchanged. The gradient of the weights goes to
# back_weight, and is there only for back_offsets None, where it has one element for each row of x.
OPERATOR = Operator(
    "gather_rows",
    "Tensor x, Tensor index, Tensor? offsets, Tensor? weight, Tensor back_index, Tensor? back_offsets, "
    "Tensor? back_weight",
    shapes=_shapes,
    reference=gather_rows,
    differentiable=("x", "back_weight"),
    saves={"x": _DESCRIPTION, "back_weight": ("x", *_DESCRIPTION)},
    backward=_backward,
    incoming=lambda grad, a: unit_last_stride(grad),
    triton="pooling.gather_rows.triton",
    reasons=dict.fromkeys(("cpu", "cuda", "device_on_host", "triton"), _too_many),
)
