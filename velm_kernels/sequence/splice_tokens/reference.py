"""The written meaning of splice_tokens, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from velm_kernels.sequence.splice_into.reference import by_index


def splice_tokens(token_ids: Tensor, embedding_weight: Tensor, features: Tensor, mask: Tensor) -> Tensor:
    """``(..., tokens, dim)``: in order a row of features where the mask is True, else the row of the token's id."""
    embeddings = embedding_weight[token_ids.masked_fill(mask, 0)]
    return embeddings.masked_scatter(mask[..., None].expand(embeddings.shape), features.reshape(-1))


def embedded_by_index(token_ids: Tensor, weight: Tensor, features: Tensor, index: Tensor) -> Tensor:
    """``(tokens, dim)``: ``features[index]``, and ``weight[token_ids]`` where index is -1."""
    rows = torch.cat([weight, weight.new_zeros(1, weight.shape[1])])
    ids = torch.where(index >= 0, weight.shape[0], token_ids.clamp(0, max(weight.shape[0] - 1, 0)))
    return by_index(rows[ids.long()], features, index)
