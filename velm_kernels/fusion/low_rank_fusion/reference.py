"""The written meaning of low_rank_fusion, in plain torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def with_one(x: Tensor) -> Tensor:
    """``[1; x]`` along the last dimension."""
    return torch.cat([x.new_ones((*x.shape[:-1], 1)), x], -1)


def low_rank_fusion(
    inputs: Sequence[Tensor], factors: Sequence[Tensor], weight: Tensor, bias: Tensor | None = None
) -> Tensor:
    """``sum_r weight[r] * prod_m ([1; x_m] factors[m][r]) + bias``."""
    products: Tensor | None = None
    for x, factor in zip(inputs, factors, strict=True):
        # (..., rank, out)
        projected = torch.einsum("...d,rdo->...ro", with_one(x), factor)
        products = projected if products is None else products * projected
    assert products is not None
    out = torch.einsum("...ro,r->...o", products, weight)
    return out if bias is None else out + bias
