"""The written meaning of select_tokens, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor


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
