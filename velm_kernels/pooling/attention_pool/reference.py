"""The written meaning of attention_pool, in plain torch."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor


def attention_pool(
    x: Tensor,
    query: Tensor,
    key_weight: Tensor,
    value_weight: Tensor,
    key_bias: Tensor | None = None,
    value_bias: Tensor | None = None,
    *,
    heads: int,
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """The ordinary way: ``softmax(scale q k^T) v`` for each head, keys and values projected from ``x``."""
    if cu_seqlens is not None:
        bounds = cu_seqlens.tolist()
        queries = query.expand(len(bounds) - 1, *query.shape[-2:])
        given = (key_weight, value_weight, key_bias, value_bias)
        parts = [
            attention_pool(x[None, start:stop], queries[i], *given, heads=heads, scale=scale)
            for i, (start, stop) in enumerate(itertools.pairwise(bounds))
        ]
        return torch.cat(parts)
    live = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
    if lengths is not None:
        live = live & (torch.arange(x.shape[1], device=x.device) < lengths[:, None])
    if mask is not None:
        live = live & mask
    x = torch.where(live[..., None], x, 0.0)
    query = query.expand(x.shape[0], *query.shape[-2:])
    key = torch.nn.functional.linear(x, key_weight, key_bias)
    value = torch.nn.functional.linear(x, value_weight, value_bias)
    q, k, v = (t.unflatten(2, (heads, t.shape[2] // heads)).transpose(1, 2) for t in (query, key, value))
    if scale is None:
        scale = q.shape[-1] ** -0.5
    seen = live[:, None, None]
    # Where no token is live, a softmax of other numbers: its gradient is not NaN.
    scores = (scale * (q @ k.transpose(2, 3))).masked_fill(~seen, -torch.inf)
    scores = scores.masked_fill(~seen.any(-1, keepdim=True), 0.0)
    weights = torch.where(seen, scores.softmax(-1), 0.0)
    # Nothing of a weight, NaN or not, reaches an entry that sees nothing.
    return torch.where(live.any(1)[:, None, None], (weights @ v).transpose(1, 2).flatten(2), 0.0)
