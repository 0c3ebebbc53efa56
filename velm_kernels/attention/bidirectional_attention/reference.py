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
    if scale is None:
        scale = query_a.shape[-1] ** -0.5
    dropout = (dropout_p, seed)
    out_a, logsumexp_a = _one_direction(query_a, query_b, value_b, mask_b, scale, *dropout, direction=0)
    out_b, logsumexp_b = _one_direction(query_b, query_a, value_a, mask_a, scale, *dropout, direction=1)
    return out_a, out_b, logsumexp_a, logsumexp_b


def _one_direction(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
    direction: int,
) -> tuple[Tensor, Tensor]:
    batch, heads, queries, keys = (*query.shape[:3], key.shape[2])
    if mask is None:
        mask = torch.ones(batch, keys, dtype=torch.bool, device=query.device)
    zero = query.new_zeros(())
    # Each direction reads of its keys what its mask shows, so that a pair which neither direction sees is not read
    # backward either.
    key, value = (torch.where(mask[:, None, :, None], x, zero) for x in (key, value))
    scores = torch.where(mask[:, None, None, :], query @ key.transpose(-1, -2) * scale, zero - torch.inf)
    # A direction in which nothing may be attended reads no score at all.
    empty = ~mask.any(1)[:, None, None]
    scores = torch.where(empty[..., None], zero, scores)
    logsumexp = torch.logsumexp(scores, -1)
    weights = torch.where(mask[:, None, None, :], scores.softmax(-1), zero)
    if dropout_p > 0:
        assert seed is not None
        keep = dropout_keep(seed, batch, heads, queries, keys, dropout_p, direction=direction)
        weights = torch.where(keep, weights / (1 - dropout_p), zero)
    return weights @ value, logsumexp.masked_fill(empty, -torch.inf)
