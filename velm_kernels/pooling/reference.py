"""The written meaning of the pooling operators, in plain torch."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from velm_kernels.pooling.merge_tokens.reference import merge_tokens as merge_tokens
from velm_kernels.pooling.merge_tokens.reference import unmerge_tokens as unmerge_tokens
from velm_kernels.pooling.select_tokens.reference import select_tokens as select_tokens

MODES = ("mean", "sum", "max", "logsumexp", "gem")
# Where generalised mean pooling clamps from below, as in the code of Radenovic et al.
GEM_EPS = 1e-6


def masked_pool(
    x: Tensor,
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
    mode: str = "mean",
    p: float = 3.0,
    channels_first: bool = False,
) -> Tensor:
    """``(..., tokens, dim)`` to ``(..., dim)`` over the tokens before ``lengths`` and under ``mask``; 0 over none.

    With ``channels_first``: ``(batch, dim, *spatial)``, the tokens are the pixels in order.
    """
    if channels_first:
        mask = None if mask is None else mask.broadcast_to(x.shape[:1] + x.shape[2:]).flatten(1)
        x = x.flatten(2).transpose(1, 2)
    live = torch.ones(x.shape[:-1], dtype=torch.bool, device=x.device)
    if lengths is not None:
        live = live & (torch.arange(x.shape[-2], device=x.device) < lengths[..., None])
    if mask is not None:
        live = live & mask
    count, live = live.sum(-1)[..., None], live[..., None]
    x = torch.where(live, x, 0.0)
    if mode in ("sum", "mean"):
        out = x.sum(-2)
        return out if mode == "sum" else out / count.clamp(min=1)
    if mode == "gem":
        # Powers of ratios to the largest value neither overflow nor vanish, and equal values come out as they are.
        clamped = torch.where(live, x.clamp(min=GEM_EPS), GEM_EPS)
        # Beside infinity no power matters: 1 in its place, whose product with a gradient is no infinity.
        largest = clamped.detach().nan_to_num(GEM_EPS, 1.0).amax(-2, keepdim=True) if x.shape[-2] else GEM_EPS
        powers = torch.where(live, (clamped / largest) ** p, 0.0)
        mean = torch.where(count[..., None] > 0, powers.sum(-2, keepdim=True) / count[..., None], 1.0)
        out = (largest * mean ** (1 / p)).squeeze(-2)
    elif x.shape[-2] == 0:
        return x.sum(-2)
    elif mode == "logsumexp":
        # Rows of -inf alone have no gradient; those of nothing are replaced below.
        out = torch.where(live, x, torch.where(count[..., None, :] > 0, -torch.inf, 0.0)).logsumexp(-2)
    else:
        out = torch.where(live, x, -torch.inf).max(-2).values
    return torch.where(count > 0, out, 0.0)


def segment_pool(x: Tensor, cu_seqlens: Tensor, mode: str = "mean", p: float = 3.0) -> Tensor:
    """``(tokens, dim)`` to ``(segments, dim)``: row s pools ``x[cu_seqlens[s]:cu_seqlens[s + 1]]``; 0 over none."""
    bounds = cu_seqlens.tolist()
    rows = [masked_pool(x[start:stop], mode=mode, p=p) for start, stop in itertools.pairwise(bounds)]
    return torch.stack(rows) if rows else x.new_zeros(0, x.shape[1]) + x.sum(0)


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
    return (weights @ v).transpose(1, 2).flatten(2)
