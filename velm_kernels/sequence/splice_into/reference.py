"""The written meaning of splice_into, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor


def splice_into(embeddings: Tensor, features: Tensor, mask: Tensor) -> Tensor:
    """``(..., tokens, dim)``: in order a row of features where the mask is True, else the row of embeddings."""
    return embeddings.masked_scatter(mask[..., None].expand(embeddings.shape), features.reshape(-1))


def by_index(embeddings: Tensor, features: Tensor, index: Tensor) -> Tensor:
    """``(tokens, dim)``: ``features[index]``, and the row of embeddings where index is -1."""
    rows = torch.cat([features, features.new_zeros(1, features.shape[1])])
    return torch.where((index >= 0)[:, None], rows[index.long()], embeddings)
