"""The written meaning of bidirectional attention, in plain torch; arithmetic in the inputs' dtype."""

from __future__ import annotations

import torch
from torch import Tensor

from velm_kernels.philox import dropout_keep


def bidirectional_attention(
    query_a: Tensor,
    query_b: Tensor,
    value_a: Tensor,
    value_b: Tensor,
    *,
    mask_a: Tensor | None = None,
    mask_b: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Both outputs and both logsumexps of ``velm_kernels.bidirectional_attention``."""
    scores = query_a @ query_b.transpose(-1, -2) * (query_a.shape[-1] ** -0.5 if scale is None else scale)
    out_a, logsumexp_a = _one_direction(scores, value_b, mask_b, dropout_p, seed, direction=0)
    out_b, logsumexp_b = _one_direction(scores.transpose(-1, -2), value_a, mask_a, dropout_p, seed, direction=1)
    return out_a, out_b, logsumexp_a, logsumexp_b


def _one_direction(
    scores: Tensor, value: Tensor, mask: Tensor | None, dropout_p: float, seed: Tensor | None, direction: int
) -> tuple[Tensor, Tensor]:
    batch, heads, queries, keys = scores.shape
    if mask is None:
        mask = torch.ones(batch, keys, dtype=torch.bool, device=scores.device)
    zero = scores.new_zeros(())
    # A direction in which nothing may be attended reads no score at all.
    empty = ~mask.any(1)[:, None, None]
    value = torch.where(mask[:, None, :, None], value, zero)
    scores = torch.where(mask[:, None, None, :], scores, zero - torch.inf)
    scores = torch.where(empty[..., None], zero, scores)
    logsumexp = torch.logsumexp(scores, -1)
    weights = torch.where(mask[:, None, None, :], scores.softmax(-1), zero)
    if dropout_p > 0:
        assert seed is not None
        keep = dropout_keep(seed, batch, heads, queries, keys, dropout_p, direction=direction)
        weights = torch.where(keep, weights / (1 - dropout_p), zero)
    return weights @ value, logsumexp.masked_fill(empty, -torch.inf)
