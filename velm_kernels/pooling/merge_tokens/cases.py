"""What merge_tokens and unmerge_tokens are tried with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from velm_kernels.cases import Arguments, Case, Draw
from velm_kernels.pooling.merge_tokens import reference


def _merged(draw: Draw, batch: int, tokens: int, dim: int, metric_dim: int) -> Arguments:
    return {
        "x": draw(batch, tokens, dim),
        "metric": draw(batch, tokens, metric_dim, wide=True),
        "r": max(tokens - 1, 0) // 2,
        "size": 1 + draw(batch, tokens).square(),
        "protected": min(1, tokens),
    }


def _meaning(x: Tensor, metric: Tensor, r: int, size: Tensor, protected: int) -> Any:
    batch, tokens = size.shape
    if batch and tokens:
        return reference.merge_tokens(x, metric, r, size, protected)
    none = x[:, : tokens - r] * size[:, : tokens - r, None]
    return none, size[:, : tokens - r], torch.zeros(batch, tokens, dtype=torch.long)


def _unmerged(draw: Draw, batch: int, tokens: int, merged: int, dim: int) -> Arguments:
    indices = torch.arange(tokens if merged else 0).expand(batch, tokens if merged else 0) % max(merged, 1)
    return {"merged": draw(batch, merged, dim), "indices": indices}


CASES = [
    Case(
        "merge_tokens",
        "",
        _merged,
        _meaning,
        ("x", "size"),
        sizes={"batch": 2, "tokens": 9, "dim": 12, "metric_dim": 6},
        larger={"batch": 3, "tokens": 201, "dim": 40, "metric_dim": 64},
        published={
            "tome-vit": {"batch": 32, "tokens": 197, "dim": 768, "metric_dim": 64},
            "tome-vit-large": {"batch": 8, "tokens": 577, "dim": 1024, "metric_dim": 64},
        },
    ),
    Case(
        "unmerge_tokens",
        "",
        _unmerged,
        reference.unmerge_tokens,
        ("merged",),
        sizes={"batch": 2, "tokens": 8, "merged": 3, "dim": 12},
        larger={"batch": 3, "tokens": 75, "merged": 37, "dim": 90},
    ),
]
