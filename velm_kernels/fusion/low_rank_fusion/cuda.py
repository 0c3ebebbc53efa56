"""low_rank_fusion by CUDA kernels; of its backward the products of matrices are torch's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from velm_kernels.fusion.inputs import MOST_INPUTS
from velm_kernels.fusion.low_rank_fusion import products
from velm_kernels.fusion.low_rank_fusion.op import split


def low_rank_fusion_forward(kernel: Callable[[str], Callable[..., Any]], *arguments: Any) -> None:
    products.forward(kernel("low_rank_fusion_forward"), *arguments)


def low_rank_fusion_backward(kernel: Callable[[str], Callable[..., Any]], grad: Tensor, *arguments: Any) -> None:
    xs, factors, (weight, kept) = arguments[:MOST_INPUTS], arguments[MOST_INPUTS:8], arguments[8:10]
    project, gradients_of_projections = kernel("low_rank_projections"), kernel("low_rank_gradients")
    projections = split(kept, xs, factors[0])

    def gradients_of(first: int, ranks: int, wanted: list[bool]) -> tuple[list[Tensor | None], Tensor]:
        part = slice(first, first + ranks)
        some = [
            None if x is None else project(x, factor[part]) if projection is None else projection[part]
            for x, factor, projection in zip(xs, factors, projections, strict=True)
        ]
        mask = sum(1 << m for m, want in enumerate(wanted) if want)
        *gradients, sums = gradients_of_projections(grad, *some, weight[part], mask)
        return [g if want else None for g, want in zip(gradients, wanted, strict=True)], sums.sum(1)

    products.backward(gradients_of, grad, *arguments)
