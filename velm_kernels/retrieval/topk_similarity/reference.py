"""The meaning of topk_similarity in plain torch."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

METRICS = ("dot", "cosine", "l2")
# Below this norm rows are divided by it, as torch.nn.functional.normalize does.
LEAST_NORM = 1e-12
# Numbers that are multiplied at a time.
PRODUCTS = 1 << 22


def topk_similarity(
    queries: Tensor,
    database: Tensor,
    k: int,
    metric: str = "dot",
    valid: Tensor | None = None,
    ids: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``(queries, k)``: the best similarities of each query, and the rows of ``database`` or the ``ids`` of these."""
    values, places = by_place(queries, database, k, metric, valid, ids)
    if ids is None or database.shape[0] == 0:
        return values, places
    return values, torch.where(places >= 0, ids[places.clamp(min=0)], -1)


def by_place(
    queries: Tensor, database: Tensor, k: int, metric: str, valid: Tensor | None, ids: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The best similarities, and which rows have them: -1 where there are no more."""
    wide = torch.promote_types(torch.promote_types(queries.dtype, database.dtype), torch.float32)
    queries, database = queries.to(wide), database.to(wide)
    places = best(queries.detach(), database.detach(), k, metric, valid, ids)
    if database.shape[0] == 0:
        nothing = (queries.sum(1)[:, None] + database.sum()) * 0.0
        return nothing + queries.new_full((queries.shape[0], k), worst(metric)), places
    # Only what was chosen is read. (queries, k, dim)
    is_empty = (places < 0)[..., None]
    chosen = database[places.clamp(min=0)].masked_fill(is_empty, 1.0)
    values = similarity(queries[:, None].masked_fill(is_empty, 1.0), chosen, metric)
    return values.masked_fill(places < 0, worst(metric)), places


def similarity(a: Tensor, b: Tensor, metric: str) -> Tensor:
    """Of rows that are broadcast with each other."""
    if metric == "l2":
        return (a - b).square().sum(-1)
    if metric == "cosine":
        a, b = (x / torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp(min=LEAST_NORM) for x in (a, b))
    return (a * b).sum(-1)


def best(queries: Tensor, database: Tensor, k: int, metric: str, valid: Tensor | None, ids: Tensor | None) -> Tensor:
    """The rows in the order of their similarity, NaN as the greatest, and of their ids or numbers where that is equal.
    Those that are not valid come last, as -1."""
    count = database.shape[0]
    rising = torch.arange(count, device=database.device) if ids is None else ids.argsort(stable=True)
    blocks = [similarity(queries[:, None], rows, metric) for rows in _blocks(database[rising], queries.shape[0])]
    scores = torch.cat(blocks, 1) if blocks else queries.new_empty(queries.shape[0], 0)
    order = scores.sort(dim=1, descending=metric != "l2", stable=True).indices
    places = rising[order]
    if valid is not None:
        is_out = ~valid[places]
        last = is_out.to(torch.uint8).sort(dim=1, stable=True).indices
        places = places.masked_fill(is_out, -1).gather(1, last)
    return torch.nn.functional.pad(places[:, :k], (0, max(0, k - count)), value=-1)


def worst(metric: str) -> float:
    """What stands where there are no more rows."""
    return torch.inf if metric == "l2" else -torch.inf


def _blocks(database: Tensor, queries: int) -> Iterator[Tensor]:
    """Some rows at a time: the products of each pair are summed alone, so that equal rows have equal similarities."""
    step = max(1, PRODUCTS // max(1, queries * database.shape[1]))
    for first in range(0, database.shape[0], step):
        yield database[first : first + step]
