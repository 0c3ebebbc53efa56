"""The operator film: (batch, regions, dim) times and plus (batch, dim)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from velm_kernels.fusion.film.reference import film
from velm_kernels.layout import empty_like
from velm_kernels.operator import Operator


def meaning(x: Tensor, gamma: Tensor, beta: Tensor, regions_contiguous: bool, gamma_offset: float) -> Tensor:
    return film(x, gamma[:, None], beta[:, None], gamma_offset)


def gradients(a: Any, wanted: Sequence[bool]) -> tuple[Tensor | None, ...]:
    of_x, of_gamma, of_beta = wanted
    return (
        (a.gamma_offset + a.gamma[:, None]) * a.grad if of_x else None,
        (a.grad * a.x).sum(1) if of_gamma else None,
        a.grad.sum(1) if of_beta else None,
    )


def empty_like_rows(x: Tensor, regions_contiguous: bool) -> Tensor:
    """Uninitialised, of x's shape; contiguous, with ``regions_contiguous`` in the order (batch, dim, regions)."""
    if regions_contiguous:
        batch, regions, dim = x.shape
        return x.new_empty((batch, dim, regions)).transpose(1, 2)
    return empty_like(x)


def _incoming(grad: Tensor, a: Any) -> Tensor:
    return grad.transpose(1, 2).contiguous().transpose(1, 2) if a.regions_contiguous else grad.contiguous()


def _row_of(a: Any) -> Tensor:
    batch, _, dim = a.grad.shape
    row: Tensor = a.grad.new_empty((batch, dim))
    return row


# x: (batch, regions, dim), last stride 1, or, with regions_contiguous, the one before it, other strides arbitrary;
# gamma, beta: (batch, dim), last stride 1; all of one dtype. Results and grad are as empty_like_rows.
OPERATOR = Operator(
    "film",
    "Tensor x, Tensor gamma, Tensor beta, bool regions_contiguous, float gamma_offset",
    shapes=lambda a: empty_like_rows(a.x, a.regions_contiguous),
    reference=meaning,
    differentiable=("x", "gamma", "beta"),
    saves={"x": ("gamma",), "gamma": ("x",)},
    gradients=gradients,
    gradient_shapes={
        "x": lambda a: empty_like_rows(a.grad, a.regions_contiguous),
        "gamma": _row_of,
        "beta": _row_of,
    },
    incoming=_incoming,
    triton="fusion.film.triton",
)
