"""The operator merge_patches: the tokens of squares beside each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from velm_kernels.layout import unit_last_stride
from velm_kernels.operator import Operator
from velm_kernels.pooling.merge_patches.reference import apart, by_windows
from velm_kernels.pooling.pool_grid.op import result_rows, spread


def _gradients(a: Any, wanted: Sequence[bool]) -> tuple[Tensor | None]:
    return (spread(apart(a.grad, a.factor, a.channels), a) if wanted[0] else None,)


# x, windows, height, width and factor: as of pool_grid. channels: whether the features of a result run over the tokens
# of its square first. The result is contiguous.
OPERATOR = Operator(
    "merge_patches",
    "Tensor x, Tensor? windows, SymInt height, SymInt width, SymInt factor, bool channels",
    shapes=lambda a: a.x.new_empty((a.x.shape[0], result_rows(a), a.factor * a.factor * a.x.shape[2])),
    reference=by_windows,
    differentiable=("x",),
    saves=("windows",),
    remembers={"SymInt tokens": lambda a: a.x.shape[1], "SymInt dim": lambda a: a.x.shape[2]},
    gradients=_gradients,
    gradient_shapes={"x": lambda a: a.grad.new_empty((a.grad.shape[0], a.tokens, a.dim))},
    incoming=lambda grad, a: unit_last_stride(grad),
    triton="pooling.merge_patches.triton",
    cuda=False,
)
