"""The written meaning of multiscale_deformable_attention, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor


def multiscale_deformable_attention(
    value: Tensor, spatial_shapes: Tensor, sampling_locations: Tensor, attention_weights: Tensor
) -> Tensor:
    """``(batch, queries, heads * d)``: the sum over levels and points of weight times bilinear sample."""
    batch, queries, heads = sampling_locations.shape[:3]
    samples = attention_weights[..., None] * sample(value, spatial_shapes, sampling_locations)
    return samples.sum((3, 4)).reshape(batch, queries, heads * value.shape[3])


def sample(value: Tensor, spatial_shapes: Tensor, sampling_locations: Tensor) -> Tensor:
    """``(batch, queries, heads, levels, points, d)``: each level read at each location, bilinearly.

    The middle of the token in row i and column j of a level lies at ``((j + 0.5) / width, (i + 0.5) / height)``; around
    a level there are zeros.
    """
    tokens = value.shape[1]
    heights, widths = spatial_shapes.long()[:, None].unbind(-1)
    first_token = (heights * widths).cumsum(0) - heights * widths
    position = sampling_locations * spatial_shapes.flip(-1)[:, None] - 0.5
    corner = position.floor()
    right_share, lower_share = (position - corner).unbind(-1)
    of_heads = torch.nn.functional.pad(value, (0, 0, 0, 0, 0, 1)).transpose(1, 2)
    sampled: Tensor | None = None
    for below in (0, 1):
        for right in (0, 1):
            column, row = corner[..., 0] + right, corner[..., 1] + below
            inside = (column >= 0) & (column < widths) & (row >= 0) & (row < heights)
            row, column = (torch.where(inside, x, 0.0).long() for x in (row, column))
            # Outside lies the row of zeros behind the last token.
            token = torch.where(inside, first_token + row * widths + column, tokens)
            weight = (right_share if right else 1 - right_share) * (lower_share if below else 1 - lower_share)
            term = weight[..., None] * _rows(of_heads, token)
            sampled = term if sampled is None else sampled + term
    assert sampled is not None
    return sampled


def _rows(of_heads: Tensor, token: Tensor) -> Tensor:
    """``(batch, queries, heads, levels, points, d)`` from ``(batch, heads, tokens, d)`` and the numbers of tokens."""
    batch, queries, heads, levels, points = token.shape
    d = of_heads.shape[3]
    index = token.transpose(1, 2).reshape(batch, heads, queries * levels * points, 1)
    rows = of_heads.gather(2, index.expand(batch, heads, queries * levels * points, d))
    return rows.reshape(batch, heads, queries, levels, points, d).transpose(1, 2)
