"""The operator low_rank_fusion: rows of up to four inputs, those that are not there None."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from velm_kernels.backends import cuda
from velm_kernels.fusion.inputs import MOST_INPUTS
from velm_kernels.fusion.low_rank_fusion.reference import low_rank_fusion, with_one
from velm_kernels.operator import Operator

# float32 numbers that backward keeps at the most: 64 MiB.
MOST_KEPT = 1 << 24

XS, FACTORS = ([f"{name}{m}" for m in range(MOST_INPUTS)] for name in ("x", "factor"))


def numbers(xs: Sequence[Tensor | None], factor0: Tensor) -> int:
    """How many there are of the projections of all rows and ranks."""
    return sum(x.shape[0] for x in xs if x is not None) * factor0.shape[0] * factor0.shape[2]


def split(kept: Tensor | None, xs: Sequence[Tensor | None], factor0: Tensor) -> list[Tensor | None]:
    """The projections of each input in ``kept``, (rank, rows of m, out)."""
    if kept is None or kept.numel() == 0:
        return [None] * MOST_INPUTS
    rank, _, out = factor0.shape
    shapes = [(0, 0, 0) if x is None else (rank, x.shape[0], out) for x in xs]
    parts = kept.split([rank * rows * out for rank, rows, out in shapes])
    return [part.view(shape) if part.numel() else None for part, shape in zip(parts, shapes, strict=True)]


def meaning(*values: Any) -> tuple[Tensor, Tensor | None]:
    *tensors, weight, bias, rows, save = values
    xs, factors = ([value for value in four if value is not None] for four in (tensors[:4], tensors[4:]))
    repeated = [x if x.shape[0] == rows else x.repeat_interleave(rows // x.shape[0], 0) for x in xs]
    out = low_rank_fusion(repeated, factors, weight, bias)
    if not save:
        return out, None
    projected = (torch.einsum("bd,rdo->rbo", with_one(x), factor) for x, factor in zip(xs, factors, strict=True))
    return out, torch.cat([value.flatten() for value in projected])


def _shapes(a: Any) -> tuple[Tensor, Tensor | None]:
    kept = numbers([getattr(a, name) for name in XS], a.factor0)
    return (
        a.x0.new_empty((a.rows, a.factor0.shape[2])),
        a.x0.new_empty((kept,), dtype=torch.float32) if a.save else None,
    )


def _products(a: Any, names: Sequence[str]) -> int:
    """Of the matrices of some inputs, once each."""
    rank, _, out = a.factor0
    shapes = (getattr(a, name) for name in names)
    return int(sum(2 * x[0] * (1 + x[1]) * rank * out for x in shapes if x is not None))


def _backward_products(a: Any) -> int:
    wanted = [name for bit, name in enumerate([*XS, *FACTORS, "weight"]) if a.wanted >> bit & 1]
    again = XS if a.kept[0] == 0 and wanted else []
    return _products(a, [*again, *(name.replace("factor", "x") for name in wanted if name != "weight")])


# x0 to x3: (rows of m, d_m), any row stride, last stride 1; rows of m are `rows`, or divide it where a row serves as
# many neighbours of the result. factors (rank, 1 + d_m, out), weight and bias contiguous; all of one dtype. out
# (rows, out) and the gradients are contiguous. kept, if `save`: float32, the projections of all rows and ranks
# (rank, rows of m, out) one input behind the other; without elements backward computes them again.
OPERATOR = Operator(
    "low_rank_fusion",
    ", ".join(f"Tensor{'?' * (m > 1)} {names[m]}" for names in (XS, FACTORS) for m in range(MOST_INPUTS))
    + ", Tensor weight, Tensor? bias, SymInt rows, bool save",
    shapes=_shapes,
    reference=meaning,
    results=("out", "kept"),
    may_be_absent=("kept",),
    without_gradient=("kept",),
    differentiable=(*XS, *FACTORS, "weight", "bias"),
    saves=(*XS, *FACTORS, "weight", "kept"),
    gradient_shapes={"bias": lambda a: a.grad.new_empty(a.grad.shape[1:])},
    triton="fusion.low_rank_fusion.triton",
    cuda="fusion.low_rank_fusion.cuda",
    flops=lambda a: _products(a, XS),
    backward_flops=_backward_products,
)
# Steps of backward, which allocate what they hand to the next: the projections (rank, rows, out) of one input, and
# those gradients of projections that `wanted` has a bit for, with parts of the sums of grad times all projections.
cuda.declare("low_rank_projections(Tensor x, Tensor factor) -> Tensor")
cuda.declare(
    "low_rank_gradients(Tensor grad, Tensor projections0, Tensor projections1, Tensor? projections2, "
    "Tensor? projections3, Tensor weight, int wanted) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
