"""The operator add_at_tokens: rows of features added to rows of others, by number."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from velm_kernels.layout import empty_like, unit_last_stride
from velm_kernels.operator import Operator
from velm_kernels.sequence.add_at_tokens.reference import by_index
from velm_kernels.sequence.splice_into.op import rows_of_features, taken


def meaning(hidden: Tensor, features: Tensor, index: Tensor, place: Tensor) -> Tensor:
    return by_index(hidden, features, index)


def gradients(a: Any, wanted: Sequence[bool]) -> tuple[Tensor | None]:
    return (taken(a.grad, a.place) if wanted[0] else None,)


# As of splice_into, with hidden in place of embeddings.
OPERATOR = Operator(
    "add_at_tokens",
    "Tensor hidden, Tensor features, Tensor index, Tensor place",
    shapes=lambda a: empty_like(a.hidden),
    reference=meaning,
    differentiable=("features",),
    passed_on=("hidden",),
    saves={"features": ("index", "place")},
    gradients=gradients,
    gradient_shapes={"features": rows_of_features},
    incoming=lambda grad, a: unit_last_stride(grad),
    cuda=False,
)
