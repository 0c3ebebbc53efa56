"""The operator splice_into: rows of features among rows of embeddings, by number."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from velm_kernels.layout import empty_like, unit_last_stride
from velm_kernels.operator import Operator
from velm_kernels.sequence.splice_into.reference import by_index


def meaning(embeddings: Tensor, features: Tensor, index: Tensor, place: Tensor) -> Tensor:
    return by_index(embeddings, features, index)


def gradients(a: Any, wanted: Sequence[bool]) -> tuple[Tensor | None, Tensor | None]:
    of_embeddings, of_features = wanted
    return (
        a.grad.masked_fill((a.index >= 0)[:, None], 0.0) if of_embeddings else None,
        taken(a.grad, a.place) if of_features else None,
    )


def taken(grad: Tensor, place: Tensor) -> Tensor:
    """The rows of ``grad`` whose numbers are in ``place``, zeros where that is -1."""
    if grad.shape[0] == 0:
        return grad.new_zeros(place.shape[0], grad.shape[1])
    return grad[place.clamp(min=0).long()].masked_fill((place < 0)[:, None], 0.0)


def rows_of_features(a: Any) -> Tensor:
    """The uninitialised gradient of the features."""
    rows: Tensor = a.grad.new_empty((a.place.shape[0], a.grad.shape[1]))
    return rows


# embeddings: (tokens, dim), features: (n, dim), any row stride, last stride 1, one dtype. index: (tokens,) int32, the
# row of features that a token takes, or -1; place: (n,) int32, the token that takes a feature, or -1; contiguous. What
# comes out is contiguous; the gradient that comes in has last stride 1.
OPERATOR = Operator(
    "splice_into",
    "Tensor embeddings, Tensor features, Tensor index, Tensor place",
    shapes=lambda a: empty_like(a.embeddings),
    reference=meaning,
    differentiable=("embeddings", "features"),
    saves={"embeddings": ("index",), "features": ("index", "place")},
    gradients=gradients,
    gradient_shapes={"embeddings": lambda a: empty_like(a.grad), "features": rows_of_features},
    incoming=lambda grad, a: unit_last_stride(grad),
    triton="sequence.splice_into.triton",
)
