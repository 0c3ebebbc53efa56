"""What attention_pool is tried with: few queries, with keys folded into them, and more than keys have dimensions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from velm_kernels.cases import Arguments, Case, Draw
from velm_kernels.pooling.attention_pool import reference


def _weights(draw: Draw, queries: int, dim: int, heads: int, head_dim: int) -> Arguments:
    inner = heads * head_dim
    return {
        "query": draw(queries, inner),
        "key_weight": draw(inner, dim) * max(dim, 1) ** -0.5,
        "value_weight": draw(inner, dim) * max(dim, 1) ** -0.5,
        "key_bias": draw(inner),
        "value_bias": draw(inner),
        "heads": heads,
    }


def _masked(queries: int) -> Callable[..., Arguments]:
    def make(draw: Draw, batch: int, tokens: int, dim: int, head_dim: int, heads: int = 2) -> Arguments:
        given = {"lengths": torch.full((batch,), max(tokens - 2, 0)), "mask": draw.mask(batch, tokens)}
        return {"x": draw(batch, tokens, dim), **_weights(draw, queries, dim, heads, head_dim), **given}

    return make


def _unread(arguments: Arguments) -> Arguments:
    x, mask = arguments["x"], arguments["mask"]
    live = mask & (torch.arange(x.shape[1], device=x.device) < arguments["lengths"][:, None])
    hidden = {"x": x.masked_fill(~live[..., None], torch.nan)}
    return arguments | hidden | {"key_bias": torch.full_like(arguments["key_bias"], torch.nan)}


def _packed(draw: Draw, segments: int, tokens: int, dim: int, head_dim: int) -> Arguments:
    bounds = torch.arange(segments + 1, dtype=torch.int32) * tokens
    return {"x": draw(segments * tokens, dim), **_weights(draw, 1, dim, 2, head_dim), "cu_seqlens": bounds}


def _packed_meaning(x: Tensor, **others: Any) -> Tensor:
    if len(others["cu_seqlens"]) > 1:
        return reference.attention_pool(x, **others)
    query, value_weight = others["query"], others["value_weight"]
    return x.sum() + query.sum() + value_weight.new_zeros(0, len(query), len(value_weight))


_WANTED = ("x", "query", "key_weight", "value_weight", "key_bias", "value_bias")
# Scores, which are products of four factors, would get a hundred times as large.
_SCALED = ("x", "query")

CASES = [
    Case(
        "attention_pool",
        "folded",
        _masked(1),
        reference.attention_pool,
        _WANTED,
        sizes={"batch": 3, "tokens": 7, "dim": 12, "head_dim": 8},
        larger={"batch": 3, "tokens": 900, "dim": 70, "head_dim": 16, "heads": 4},
        published={
            "siglip-head": {"batch": 64, "tokens": 196, "dim": 768, "head_dim": 64, "heads": 12},
            "clip-rn50-head": {"batch": 64, "tokens": 50, "dim": 2048, "head_dim": 64, "heads": 32},
        },
        not_zero=("head_dim",),
        unread=_unread,
        vanishing=("key_bias",),
        scaled=_SCALED,
    ),
    Case(
        "attention_pool",
        "ordinary",
        _masked(40),
        reference.attention_pool,
        _WANTED,
        sizes={"batch": 3, "tokens": 7, "dim": 12, "head_dim": 8},
        larger={"batch": 3, "tokens": 75, "dim": 80, "head_dim": 16, "heads": 4},
        not_zero=("head_dim",),
        unread=_unread,
        vanishing=("key_bias",),
        scaled=_SCALED,
    ),
    Case(
        "attention_pool",
        "packed",
        _packed,
        _packed_meaning,
        _WANTED,
        sizes={"segments": 2, "tokens": 7, "dim": 12, "head_dim": 8},
        larger={"segments": 3, "tokens": 150, "dim": 70, "head_dim": 16},
        not_zero=("head_dim",),
        vanishing=("key_bias",),
        scaled=_SCALED,
    ),
]
