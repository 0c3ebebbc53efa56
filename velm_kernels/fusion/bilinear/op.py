"""The operators bilinear, of rows, and folded_bilinear, of one row of x for several of y."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from velm_kernels.backends import Arguments, order
from velm_kernels.fusion.bilinear import reference, rule
from velm_kernels.layout import product, unit_last_stride
from velm_kernels.operator import Operator

ARGUMENTS = "Tensor x, Tensor y, Tensor weight, Tensor? bias"


def meaning(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return reference.bilinear(x[:, None] if y.dim() == 3 else x, y, weight, bias)


def _out(a: Any) -> Tensor:
    made: Tensor = a.x.new_empty((*a.y.shape[:-1], a.weight.shape[0]))
    return made


def _bias(a: Any) -> Tensor:
    made: Tensor = a.weight.new_empty(a.weight.shape[:1])
    return made


def _incoming(grad: Tensor, a: Any) -> Tensor:
    return unit_last_stride(grad)


def _wanted(a: Any) -> tuple[bool, ...]:
    return tuple(bool(a.wanted >> bit & 1) for bit in range(4))


def _backward_flops(a: Any) -> int:
    of_x, of_y, of_weight, _ = _wanted(a)
    return int(2 * a.x[0] * product(a.weight) * ((of_x or of_y) + of_weight))


def _folded_flops(a: Any) -> int:
    out, _, dy = a.weight
    return int(2 * a.x[0] * (product(a.weight) + a.y[1] * out * dy))


def _folded_backward_flops(a: Any) -> int:
    out, _, dy = a.weight
    of_x, of_y, of_weight, _ = _wanted(a)
    of_regions = of_y + (of_x or of_weight)
    return int(2 * a.x[0] * (product(a.weight) * (of_x + of_y + of_weight) + a.y[1] * out * dy * of_regions))


def _why_not_torch(arguments: Arguments) -> list[str]:
    dtype = arguments["x"].dtype
    return [] if dtype == torch.float32 else [f"torch rounds sums to {dtype}"]


# x (rows, dx), y (rows, dy), any row stride, last stride 1; weight (out, dx, dy), last stride 1; bias contiguous; all
# of one dtype. out (rows, out) and all gradients contiguous; grad any row stride, last stride 1.
BILINEAR = Operator(
    "bilinear",
    ARGUMENTS,
    shapes=_out,
    reference=meaning,
    differentiable=("x", "y", "weight", "bias"),
    saves=("x", "y", "weight"),
    gradient_shapes={"bias": _bias},
    incoming=_incoming,
    triton="fusion.bilinear.triton",
    torch="fusion.bilinear.torch",
    reasons={"torch": _why_not_torch},
    flops=lambda a: int(2 * a.x[0] * product(a.weight)),
    backward_flops=_backward_flops,
)
order.prefer_torch(BILINEAR.forward, on_cpu=lambda a: rule.torchs_forward(a["x"].shape[0], a["weight"]))
# x (batch, dx), y (batch, regions, dy), out (batch, regions, out); else as above. Nothing but products of matrices:
# torch's, on every device.
FOLDED = Operator(
    "folded_bilinear",
    ARGUMENTS,
    shapes=_out,
    reference=meaning,
    differentiable=("x", "y", "weight", "bias"),
    saves=("x", "y", "weight"),
    gradient_shapes={"bias": _bias},
    incoming=_incoming,
    torch="fusion.bilinear.torch",
    torch_alone=True,
    flops=_folded_flops,
    backward_flops=_folded_backward_flops,
)
for _name in (FOLDED.forward, FOLDED.backward):
    order.prefer_torch(_name, on_cpu=lambda a: True)


def operator_for(arguments: Arguments) -> Operator:
    """The one of the two that canonical arguments are for."""
    return FOLDED if arguments["y"].dim() == 3 else BILINEAR
