"""The operator factorized_pool: rows of products, summed and normalised."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from velm_kernels.fusion.factorized_pool import reference
from velm_kernels.operator import Operator

LAYOUTS = ("inner", "outer")


def meaning(
    a: Tensor,
    b: Tensor,
    seed: Tensor | None,
    factor: int,
    inner: bool,
    power_norm: bool,
    l2_norm: bool,
    dropout_p: float,
) -> Tensor:
    return reference.factorized_pool(a, b, factor, LAYOUTS[not inner], power_norm, l2_norm, dropout_p, seed)


def gradients(v: Any, wanted: Sequence[bool]) -> tuple[Tensor, Tensor]:
    settings = (v.factor, LAYOUTS[not v.inner], v.power_norm, v.l2_norm, v.dropout_p, v.seed)
    return reference.factorized_pool_gradient(v.grad, v.a, v.b, *settings)


# a, b: (batch, regions, factor * dim), last stride 1, other strides arbitrary (0 where broadcast), one dtype; grad and
# out: (batch, regions, dim) contiguous; seed: int64 scalar, given iff dropout_p > 0. Gradients are contiguous.
OPERATOR = Operator(
    "factorized_pool",
    "Tensor a, Tensor b, Tensor? seed, int factor, bool inner, bool power_norm, bool l2_norm, float dropout_p",
    shapes=lambda v: v.a.new_empty((*v.a.shape[:2], v.a.shape[2] // v.factor)),
    reference=meaning,
    differentiable=("a", "b"),
    saves=("a", "b", "seed"),
    gradients=gradients,
    triton="fusion.factorized_pool.triton",
)
