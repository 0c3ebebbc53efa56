"""The operator weighted_sum: (batch, regions, dim) each, times (batch, n), summed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from velm_kernels.fusion.weighted_sum.reference import weighted_sum
from velm_kernels.operator import Operator


def most_regions(features: Sequence[Tensor]) -> int:
    regions = features[0].shape[1]
    for value in features[1:]:
        regions = max(regions, value.shape[1])
    return regions


def meaning(features: Sequence[Tensor], weights: Tensor) -> Tensor:
    return weighted_sum(features, weights[:, None])


def gradients(a: Any, wanted: Sequence[Any]) -> tuple[list[Tensor | None], Tensor | None]:
    of_features, of_weights = wanted
    # What a feature with one region of several gets is the sum over all of them.
    grads = [a.grad.sum(1, keepdim=True) if broadcast else a.grad for broadcast in a.broadcast]
    scaled = [a.weights[:, i, None, None] * grad if of_features[i] else None for i, grad in enumerate(grads)]
    if not of_weights:
        return scaled, None
    return scaled, torch.stack([(grad * x).sum((1, 2)) for grad, x in zip(grads, a.features, strict=True)], 1)


def _empty(a: Any) -> Tensor:
    batch, _, dim = a.features[0].shape
    out: Tensor = a.features[0].new_empty((batch, most_regions(a.features), dim))
    return out


def _broadcast(a: Any) -> list[bool]:
    regions = most_regions(a.features)
    return [value.shape[1] != regions for value in a.features]


def _empty_gradient(a: Any, i: int) -> Tensor:
    batch, regions, dim = a.grad.shape
    grad: Tensor = a.grad.new_empty((batch, 1 if a.broadcast[i] else regions, dim))
    return grad


# features: (batch, regions, dim) or (batch, 1, dim) each, last stride 1, other strides arbitrary; weights: (batch, n)
# contiguous, float32. Out: (batch, regions, dim) contiguous. broadcast tells which features have one region of several.
OPERATOR = Operator(
    "weighted_sum",
    "Tensor[] features, Tensor weights",
    shapes=_empty,
    reference=meaning,
    differentiable=("features", "weights"),
    saves={"features": ("weights",), "weights": ("features", "weights")},
    remembers={"bool[] broadcast": _broadcast},
    gradients=gradients,
    gradient_shapes={"features": _empty_gradient},
    triton="fusion.weighted_sum.triton",
)
