"""The written meaning of weighted_sum, in plain torch."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def weighted_sum(features: Sequence[Tensor], weights: Tensor) -> Tensor:
    """``sum_i weights[..., i] * features[i]`` for features that broadcast and weights ``(batch, 1, ..., n)``."""
    out = weights[..., 0:1] * features[0]
    for i, value in enumerate(features[1:], 1):
        out = out + weights[..., i : i + 1] * value
    return out
