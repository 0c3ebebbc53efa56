"""The meaning of maxsim in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor


def maxsim(
    queries: Tensor, documents: Tensor, query_mask: Tensor | None = None, document_mask: Tensor | None = None
) -> Tensor:
    """``sum_i max_j q_i . d_j`` for every query and document: each token of a query reads the nearest one alone."""
    places = nearest(queries, documents, query_mask, document_mask)
    if documents.shape[1] == 0:
        return (queries.sum((1, 2))[:, None] + documents.sum((1, 2))) * 0.0
    is_there = places >= 0
    # (queries, documents, tokens of a query, dim)
    of_document = torch.arange(documents.shape[0], device=documents.device)[:, None]
    chosen = documents[of_document, places.clamp(min=0)].masked_fill(~is_there[..., None], 0.0)
    return (queries[:, None].masked_fill(~is_there[..., None], 0.0) * chosen).sum((-1, -2))


def nearest(
    queries: Tensor, documents: Tensor, query_mask: Tensor | None = None, document_mask: Tensor | None = None
) -> Tensor:
    """(queries, documents, tokens of a query): the place of the largest score in each document, -1 for none."""
    if documents.shape[1] == 0:
        return queries.new_full((queries.shape[0], documents.shape[0], queries.shape[1]), -1, dtype=torch.int64)
    scores = queries.detach()[:, None] @ documents.detach()[None].transpose(-1, -2)
    if document_mask is not None:
        scores = scores.masked_fill(~document_mask[:, None], -torch.inf)
    places = scores.max(-1).indices
    if document_mask is not None:
        # Where all that count are -inf, the first of these and not of all.
        places = torch.maximum(places, document_mask.int().argmax(-1)[:, None])
        places = places.masked_fill(~document_mask.any(-1)[:, None], -1)
    return places if query_mask is None else places.masked_fill(~query_mask[:, None], -1)
