"""The written meaning of add_at_tokens, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor


def add_at_tokens(hidden: Tensor, features: Tensor, mask: Tensor) -> Tensor:
    """``(..., tokens, dim)``: in order a row of features added where the mask is True."""
    return hidden + torch.zeros_like(hidden).masked_scatter(mask[..., None].expand(hidden.shape), features.reshape(-1))


def by_index(hidden: Tensor, features: Tensor, index: Tensor) -> Tensor:
    """``(tokens, dim)``: ``hidden + features[index]``, and hidden alone where index is -1."""
    rows = torch.cat([features, features.new_zeros(1, features.shape[1])])
    return torch.where((index >= 0)[:, None], hidden + rows[index.long()], hidden)
