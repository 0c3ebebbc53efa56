"""Searches of a state of an index: exact by the operator, or approximate, and exact where rows are newer than that."""

from __future__ import annotations

import torch
from torch import Tensor

from velm_kernels.retrieval.merge_topk import merge_topk
from velm_kernels.retrieval.store import Segment, State
from velm_kernels.retrieval.topk_similarity import topk_similarity

Found = tuple[Tensor, Tensor]
# Of fewer than one row in so many the features are gathered.
FEW = 8


def worst(metric: str) -> float:
    """The value where nothing was found."""
    return torch.inf if metric == "l2" else -torch.inf


def merged(parts: list[Found], k: int, metric: str) -> Found:
    return merge_topk([values for values, _ in parts], [ids for _, ids in parts], k, largest=metric != "l2")


def exact(state: State, queries: Tensor, k: int, metric: str, order: Tensor | None = None) -> Found:
    """``(values, ids)``, both ``(queries, k)``. ``order``: of these rows alone, all there, by their
    numbers."""
    parts = _parts(state, queries, k, metric, order)
    if not parts:
        none = state.segments[0]
        return topk_similarity(queries, none.features[:0], k, metric, None, none.ids[:0])
    return parts[0] if len(parts) == 1 else merged(parts, k, metric)


def nearest(state: State, queries: Tensor, k: int, metric: str, order: Tensor | None, engine: str) -> Found:
    near = state.approximate
    # Among few rows a search of lists would come to nothing often.
    few = order is not None and len(order) * FEW < state.size
    if engine == "exact" or near is None or few:
        return exact(state, queries, k, metric, order)
    parts = [near.search(state, queries, k, order), *_parts(state, queries, k, metric, order, near.until)]
    return merged(parts, k, metric)


def _parts(
    state: State, queries: Tensor, k: int, metric: str, order: Tensor | None = None, since: int = 0
) -> list[Found]:
    """What is found in each segment that has rows which count: those with the number ``since`` and later ones."""
    parts = []
    for segment in state.segments:
        if segment.count > segment.dead:
            features, ids, valid = _chosen(segment, order, since)
            if len(ids):
                parts.append(topk_similarity(queries, features, k, metric, valid, ids))
    return parts


def _chosen(segment: Segment, order: Tensor | None, since: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """The rows to search: features, ids and which of them count."""
    first = int(torch.searchsorted(segment.order[: segment.count], since)) if since else 0
    features, ids = segment.features[first : segment.count], segment.ids[first : segment.count]
    if order is not None:
        # All of them are there.
        _, rows = segment.find(order)
        rows = rows[rows >= first] - first
        if len(rows) * FEW < len(ids):
            rows = rows.to(features.device)
            return features[rows], ids[rows], None
        valid = torch.zeros(len(ids), dtype=torch.bool, device="cpu")
        valid[rows] = True
        return features, ids, valid.to(features.device)
    mask = segment.mask()
    return features, ids, None if mask is None else mask[first:].to(features.device)


def without(found: Found, exclude: Tensor, k: int, metric: str) -> Found:
    """The first ``k`` of what was found that are none of ``exclude (queries, some)``."""
    values, ids = found
    is_out = (ids[:, :, None] == exclude[:, None, :]).any(-1)
    # What is out goes behind the rest, whose order stays.
    places = is_out.to(torch.uint8).sort(dim=1, stable=True).indices[:, :k]
    is_out = is_out.gather(1, places)
    values, ids = values.gather(1, places), ids.gather(1, places)
    return values.masked_fill(is_out, worst(metric)), ids.masked_fill(is_out, -1)
