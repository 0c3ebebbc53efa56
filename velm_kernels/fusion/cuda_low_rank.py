"""low_rank_fusion by CUDA kernels; of its backward the products of matrices are torch's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from velm_kernels.backends import cuda
from velm_kernels.fusion import low_rank_products
from velm_kernels.fusion.low_rank_products import MODALITIES

cuda.declare("low_rank_projections(Tensor x, Tensor factor) -> Tensor")
cuda.declare(
    "low_rank_gradients(Tensor grad, Tensor projections0, Tensor projections1, Tensor? projections2, "
    "Tensor? projections3, Tensor weight, int wanted) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def forward(namespace: str, *arguments: Any) -> tuple[Tensor, Tensor]:
    """`velm::low_rank_fusion_forward` by the kernels of the library that has this namespace."""
    return low_rank_products.forward(getattr(torch.ops, namespace).low_rank_fusion_forward, *arguments)


def backward(namespace: str, grad: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    """`velm::low_rank_fusion_backward` by the kernels of the library that has this namespace."""
    *tensors, weight, kept, _, _ = arguments
    xs, factors = tuple(tensors[:MODALITIES]), tuple(tensors[MODALITIES:])
    operators = getattr(torch.ops, namespace)
    projections = low_rank_products.split(kept, xs, factors[0])

    def gradients_of(first: int, ranks: int, wanted: list[bool]) -> tuple[list[Tensor | None], Tensor]:
        part = slice(first, first + ranks)
        some = [
            None
            if x is None
            else operators.low_rank_projections(x, factor[part])
            if projection is None
            else projection[part]
            for x, factor, projection in zip(xs, factors, projections, strict=True)
        ]
        mask = sum(1 << m for m, want in enumerate(wanted) if want)
        *gradients, sums = operators.low_rank_gradients(grad, *some, weight[part], mask)
        return [g if want else None for g, want in zip(gradients, wanted, strict=True)], sums.sum(1)

    return low_rank_products.backward(gradients_of, grad, *arguments)
