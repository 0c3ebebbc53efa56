"""The written meaning of merge_tokens and unmerge_tokens, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor


def merge_tokens(
    x: Tensor, metric: Tensor, r: int, size: Tensor | None = None, protected: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """``(..., tokens, dim)`` to ``(..., tokens - r, dim)``, sizes, and the row that each token went to."""
    if x.dim() > 2:
        sizes = [None] * len(x) if size is None else size
        rows = [merge_tokens(*row, protected=protected) for row in zip(x, metric, [r] * len(x), sizes, strict=True)]
        return tuple(map(torch.stack, zip(*rows, strict=True)))  # type: ignore[return-value]
    tokens = len(x)
    size = x.new_ones(tokens) if size is None else size
    norm = metric.norm(dim=1, keepdim=True)
    unit = torch.where(norm == 0, 0.0, metric / norm)
    a, b = (range(protected + (protected + which) % 2, tokens, 2) for which in (0, 1))
    similarity = (unit[list(a)] @ unit[list(b)].T).nan_to_num(-torch.inf, torch.inf, -torch.inf)
    best = {
        i: max(enumerate(row), key=lambda match: match[1]) for i, row in zip(a, similarity.tolist(), strict=True) if row
    }
    merged = sorted(best, key=lambda i: -best[i][1])[:r]
    kept = [*range(protected), *(i for i in a if i not in merged), *b]
    goes_to = {i: kept.index(i) for i in kept} | {i: kept.index(b[best[i][0]]) for i in merged}
    index = torch.tensor([goes_to[i] for i in range(tokens)], dtype=torch.long)
    size = size.to(x.dtype)
    total = size.new_zeros(len(kept)).index_add(0, index, size)
    sums = x.new_zeros(len(kept), x.shape[1]).index_add(0, index, x * size[:, None])
    return sums / total[:, None], total, index


def unmerge_tokens(merged: Tensor, indices: Tensor) -> Tensor:
    """``(..., merged, dim)`` to ``(..., tokens, dim)``: the row of each token."""
    return merged.gather(-2, indices[..., None].expand(*indices.shape, merged.shape[-1]))
