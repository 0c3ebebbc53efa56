"""The operator dropout_residual: rows of a matrix."""

from __future__ import annotations

from velm_kernels.fusion.dropout_residual.reference import dropout_residual
from velm_kernels.layout import empty_like, unit_last_stride
from velm_kernels.operator import Operator

# x, residual, grad: (rows, dim), any row stride, last stride 1, one dtype; seed: int64 scalar. Results contiguous.
OPERATOR = Operator(
    "dropout_residual",
    "Tensor x, Tensor? residual, Tensor seed, float dropout_p",
    shapes=lambda a: empty_like(a.x),
    reference=dropout_residual,
    differentiable=("x",),
    passed_on=("residual",),
    saves=("seed",),
    gradients=lambda a, wanted: (dropout_residual(a.grad, None, a.seed, a.dropout_p),),
    gradient_shapes={"x": lambda a: empty_like(a.grad)},
    incoming=lambda grad, a: unit_last_stride(grad),
    triton="fusion.dropout_residual.triton",
)
