"""The written meaning of the pooling operators, in plain torch."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

MODES = ("mean", "sum", "max", "logsumexp", "gem")
# Where generalised mean pooling clamps from below, as in the code of Radenovic et al.
GEM_EPS = 1e-6


def masked_pool(
    x: Tensor,
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
    mode: str = "mean",
    p: float = 3.0,
    channels_first: bool = False,
) -> Tensor:
    """``(..., tokens, dim)`` to ``(..., dim)`` over the tokens before ``lengths`` and under ``mask``; 0 over none.

    With ``channels_first``: ``(batch, dim, *spatial)``, the tokens are the pixels in order.
    """
    if channels_first:
        mask = None if mask is None else mask.broadcast_to(x.shape[:1] + x.shape[2:]).flatten(1)
        x = x.flatten(2).transpose(1, 2)
    live = torch.ones(x.shape[:-1], dtype=torch.bool, device=x.device)
    if lengths is not None:
        live = live & (torch.arange(x.shape[-2], device=x.device) < lengths[..., None])
    if mask is not None:
        live = live & mask
    count, live = live.sum(-1)[..., None], live[..., None]
    x = torch.where(live, x, 0.0)
    if mode in ("sum", "mean"):
        out = x.sum(-2)
        return out if mode == "sum" else out / count.clamp(min=1)
    if mode == "gem":
        # Powers of ratios to the largest value neither overflow nor vanish, and equal values come out as they are.
        clamped = torch.where(live, x.clamp(min=GEM_EPS), GEM_EPS)
        largest = clamped.detach().nan_to_num(GEM_EPS).amax(-2, keepdim=True) if x.shape[-2] else GEM_EPS
        powers = torch.where(live, (clamped / largest) ** p, 0.0)
        mean = torch.where(count[..., None] > 0, powers.sum(-2, keepdim=True) / count[..., None], 1.0)
        out = (largest * mean ** (1 / p)).squeeze(-2)
    elif x.shape[-2] == 0:
        return x.sum(-2)
    elif mode == "logsumexp":
        # Rows of -inf alone have no gradient; those of nothing are replaced below.
        out = torch.where(live, x, torch.where(count[..., None, :] > 0, -torch.inf, 0.0)).logsumexp(-2)
    else:
        out = torch.where(live, x, -torch.inf).max(-2).values
    return torch.where(count > 0, out, 0.0)


def segment_pool(x: Tensor, cu_seqlens: Tensor, mode: str = "mean", p: float = 3.0) -> Tensor:
    """``(tokens, dim)`` to ``(segments, dim)``: row s pools ``x[cu_seqlens[s]:cu_seqlens[s + 1]]``; 0 over none."""
    bounds = cu_seqlens.tolist()
    rows = [masked_pool(x[start:stop], mode=mode, p=p) for start, stop in itertools.pairwise(bounds)]
    return torch.stack(rows) if rows else x.new_zeros(0, x.shape[1]) + x.sum(0)


def select_tokens(
    x: Tensor,
    scores: Tensor,
    k: int | Tensor,
    *,
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
    max_k: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``(..., tokens, dim)`` to ``(..., kept, dim)``: of the tokens that may be taken the ``k`` of highest score, the
    first of equal ones, in their order; behind them zeros."""
    leading, (tokens, dim) = x.shape[:-2], x.shape[-2:]
    kept = k if isinstance(k, int) else tokens if max_k is None else max_k
    live = torch.ones(scores.shape, dtype=torch.bool) if mask is None else mask.broadcast_to(scores.shape)
    if lengths is not None:
        live = live & (torch.arange(tokens) < lengths[..., None])
    wanted = torch.as_tensor(k).expand(leading).reshape(-1).tolist()
    shape = (len(wanted), tokens)
    ranks, live = scores.nan_to_num(-torch.inf, torch.inf, -torch.inf).reshape(shape), live.reshape(shape)
    indices = []
    for score, allowed, count in zip(ranks.tolist(), live.tolist(), wanted, strict=True):
        best = sorted((i for i in range(tokens) if allowed[i]), key=lambda i: -score[i])
        indices.append(sorted(best[:count]))
    out = torch.stack(
        [
            torch.cat([row[taken], row.new_zeros(kept - len(taken), dim)])
            for row, taken in zip(x.reshape(*shape, dim), indices, strict=True)
        ]
    )
    padded = torch.tensor([taken + [-1] * (kept - len(taken)) for taken in indices], dtype=torch.long)
    lengths = torch.tensor([len(taken) for taken in indices], dtype=torch.int32)
    return out.view(*leading, kept, dim), padded.view(*leading, kept), lengths.view(leading)


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


def attention_pool(
    x: Tensor,
    query: Tensor,
    key_weight: Tensor,
    value_weight: Tensor,
    key_bias: Tensor | None = None,
    value_bias: Tensor | None = None,
    *,
    heads: int,
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """The ordinary way: ``softmax(scale q k^T) v`` for each head, keys and values projected from ``x``."""
    if cu_seqlens is not None:
        bounds = cu_seqlens.tolist()
        queries = query.expand(len(bounds) - 1, *query.shape[-2:])
        given = (key_weight, value_weight, key_bias, value_bias)
        parts = [
            attention_pool(x[None, start:stop], queries[i], *given, heads=heads, scale=scale)
            for i, (start, stop) in enumerate(itertools.pairwise(bounds))
        ]
        return torch.cat(parts)
    live = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
    if lengths is not None:
        live = live & (torch.arange(x.shape[1], device=x.device) < lengths[:, None])
    if mask is not None:
        live = live & mask
    x = torch.where(live[..., None], x, 0.0)
    query = query.expand(x.shape[0], *query.shape[-2:])
    key = torch.nn.functional.linear(x, key_weight, key_bias)
    value = torch.nn.functional.linear(x, value_weight, value_bias)
    q, k, v = (t.unflatten(2, (heads, t.shape[2] // heads)).transpose(1, 2) for t in (query, key, value))
    if scale is None:
        scale = q.shape[-1] ** -0.5
    seen = live[:, None, None]
    # Where no token is live, a softmax of other numbers: its gradient is not NaN.
    scores = (scale * (q @ k.transpose(2, 3))).masked_fill(~seen, -torch.inf)
    scores = scores.masked_fill(~seen.any(-1, keepdim=True), 0.0)
    weights = torch.where(seen, scores.softmax(-1), 0.0)
    return (weights @ v).transpose(1, 2).flatten(2)
