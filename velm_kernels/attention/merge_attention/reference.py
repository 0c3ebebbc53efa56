"""The written meaning of merge_attention, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor


def merge_attention(outs: Tensor, logsumexps: Tensor) -> tuple[Tensor, Tensor]:
    """Output and logsumexp over all shards, from ``(shards, ..., head_dim)`` and ``(shards, ...)``."""
    present = logsumexps != -torch.inf
    empty = ~present.any(0)
    outs = torch.where(present[..., None], outs, outs.new_zeros(()))
    # Nothing passes back to a shard that adds nothing.
    absent = torch.where(empty, 0.0, -torch.inf).to(logsumexps.dtype)
    logsumexps = torch.where(present, logsumexps, absent)
    logsumexp = torch.logsumexp(logsumexps, 0)
    weights = torch.where(present, logsumexps.softmax(0), logsumexps.new_zeros(()))
    return (weights[..., None].to(outs.dtype) * outs).sum(0), logsumexp.masked_fill(empty, -torch.inf)
