"""The written meaning of bilinear_attention and bilinear_attention_pool, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor


def live_rows(x: Tensor, lengths: Tensor | None, mask: Tensor | None) -> Tensor:
    """Which rows of ``x (batch, rows, k)`` count, bool ``(batch, rows)``."""
    live = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if mask is None else mask
    return live if lengths is None else live & (torch.arange(x.shape[1], device=x.device) < lengths[:, None])


def _with_pairs(v_live: Tensor, q_live: Tensor) -> tuple[Tensor, Tensor]:
    """The live rows that are in a live pair: none where the other side has none."""
    return v_live & q_live.any(-1, keepdim=True), q_live & v_live.any(-1, keepdim=True)


def bilinear_attention(
    v: Tensor, q: Tensor, h: Tensor, bias: Tensor | None, v_live: Tensor, q_live: Tensor
) -> tuple[Tensor, Tensor]:
    """``softmax over the live pairs (i, j) of sum_k h[g, k] v[b, i, k] q[b, j, k] + bias[g]``, and its logits."""
    v_live, q_live = _with_pairs(v_live, q_live)
    v, q = torch.where(v_live[..., None], v, 0.0), torch.where(q_live[..., None], q, 0.0)
    products = torch.einsum("gk,bik,bjk->bgij", h, v, q)
    pairs = (v_live[:, None, :, None] & q_live[:, None, None]).expand(products.shape)
    logits = products if bias is None else products + bias[:, None, None]
    # A bias shifts all scores of a softmax alike: it has no gradient from there, and is seen only if it is not finite.
    # Where there is no pair, a softmax of other numbers: its gradient is not NaN.
    some = pairs.any(-1).any(-1)[..., None, None]
    scores = products if bias is None else products + bias.detach()[:, None, None]
    scores = torch.where(some, scores.masked_fill(~pairs, -torch.inf), 0.0)
    maps = torch.where(pairs, scores.flatten(2).softmax(-1).view(scores.shape), 0.0)
    return maps, logits.masked_fill(~pairs, -torch.inf)


def bilinear_attention_pool(v: Tensor, q: Tensor, attention: Tensor, v_live: Tensor, q_live: Tensor) -> Tensor:
    """``sum over the live pairs (i, j) of attention[b, g, i, j] v[b, i, k] q[b, j, k]``."""
    v_live, q_live = _with_pairs(v_live, q_live)
    v, q = torch.where(v_live[..., None], v, 0.0), torch.where(q_live[..., None], q, 0.0)
    attention = torch.where(v_live[:, None, :, None] & q_live[:, None, None], attention, 0.0)
    return torch.einsum("bgij,bik,bjk->bgk", attention, v, q)
