"""The written meaning of masked_pool and segment_pool, in plain torch."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

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
