"""The written meaning of rotary, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor


def rotary(
    query: Tensor,
    key: Tensor,
    cos: Tensor,
    sin: Tensor,
    layout: str = "halves",
    query_norm_weight: Tensor | None = None,
    key_norm_weight: Tensor | None = None,
    norm_eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """``x * cos + R(x) * sin`` of query and key, ``(batch, heads, tokens, head_dim)``, after their norms; cos and sin
    are ``(batch, tokens, rotated)``."""
    return (
        rotate(rms_norm(query, query_norm_weight, norm_eps), cos, sin, layout),
        rotate(rms_norm(key, key_norm_weight, norm_eps), cos, sin, layout),
    )


def rotate(x: Tensor, cos: Tensor, sin: Tensor, layout: str) -> Tensor:
    """The first columns of ``x`` rotated, as many as cos has; the others as they are."""
    x, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    return torch.cat([x * cos[:, None] + turned(x, layout) * sin[:, None], rest], -1)


def turned(x: Tensor, layout: str) -> Tensor:
    """R(x): each pair (first, second) of columns turned by a right angle, to (-second, first)."""
    if layout == "pairs":
        return torch.stack([-x[..., 1::2], x[..., 0::2]], -1).flatten(-2)
    if layout == "quarters":
        return torch.cat([turned(half, "halves") for half in x.chunk(2, -1)], -1)
    half = x.shape[-1] // 2
    return torch.cat([-x[..., half:], x[..., :half]], -1)


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """``weight * x / sqrt(mean(x^2) + eps)``, the mean over head_dim, or with a weight for all heads over these too."""
    if weight is None:
        return x
    heads, head_dim = x.shape[1], x.shape[3]
    if weight.numel() == head_dim:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight
    return x * torch.rsqrt(x.square().mean((1, 3), keepdim=True) + eps) * weight.view(heads, 1, head_dim)
