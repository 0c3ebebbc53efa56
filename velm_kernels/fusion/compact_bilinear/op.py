"""The operator compact_bilinear: count sketches, and products of their Fourier transforms."""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor

from velm_kernels import checks
from velm_kernels.backends import ON_REQUEST, ORDER, Arguments, cpu, reasons_against
from velm_kernels.fusion.compact_bilinear import reference
from velm_kernels.fusion.count_sketches.op import OPERATOR as COUNT_SKETCHES
from velm_kernels.fusion.count_sketches.reference import count_sketch
from velm_kernels.operator import Operator

_INPUTS = ("x", "index_x", "sign_x", "y", "index_y", "sign_y")


def meaning(x: Tensor, y: Tensor, index_x: Tensor, sign_x: Tensor, index_y: Tensor, sign_y: Tensor, dim: int) -> Tensor:
    sketches = (index_x.long(), sign_x), (index_y.long(), sign_y)
    if not x.shape[0] * max(x.shape[1], y.shape[1]):
        # Transforms do not take nothing.
        a, b = (count_sketch(value, *s, dim) for value, s in zip((x, y), sketches, strict=True))
        return a * b
    return reference.compact_bilinear(x, y, *sketches, dim)


def _empty(a: Any) -> Tensor:
    out: Tensor = a.x.new_empty((a.x.shape[0], max(a.x.shape[1], a.y.shape[1]), a.dim))
    return out


def _check(arguments: Arguments) -> None:
    for name in ("index_x", "index_y"):
        checks.values_between(f"sketch_{name[-1]}.bucket", arguments[name], 0, arguments["dim"] - 1)


def _why_no_sketches(backend: str, arguments: Arguments) -> list[str]:
    return reasons_against(COUNT_SKETCHES.forward, {name: arguments[name] for name in _INPUTS}, backend)[backend]


# Real and imaginary parts in turn; float32, contiguous.
cpu.declare("multiply_spectra(Tensor a, Tensor b, Tensor(a!) out) -> ()")

# x: (batch, regions, dx) or (batch, 1, dx), y the same with dy, one dtype, last stride 1; index: int32, sign: float32,
# contiguous, of the features. Results and gradients are contiguous.
OPERATOR = Operator(
    "compact_bilinear",
    "Tensor x, Tensor y, Tensor index_x, Tensor sign_x, Tensor index_y, Tensor sign_y, SymInt dim",
    shapes=_empty,
    reference=meaning,
    differentiable=("x", "y"),
    saves=("x", "y", "index_x", "sign_x", "index_y", "sign_y"),
    composed="fusion.compact_bilinear.composed",
    reasons={backend: functools.partial(_why_no_sketches, backend) for backend in ORDER + ON_REQUEST},
    check=_check,
)
