"""What cross_attention_varlen is tried with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from velm_kernels.attention.cross_attention import reference
from velm_kernels.attention.cross_attention.arguments import MAX_HEAD_DIM
from velm_kernels.cases import Arguments, Case, Draw

_QKV = ("query", "key", "value")


def _packed(draw: Draw, sequences: int, heads: int, queries: int, keys: int, head_dim: int) -> Arguments:
    return {
        "query": draw(sequences * queries, heads, head_dim),
        "key": draw(sequences * keys, heads, head_dim),
        "value": draw(sequences * keys, heads, head_dim),
        "cu_seqlens_q": torch.arange(sequences + 1, dtype=torch.int32) * queries,
        "cu_seqlens_k": torch.arange(sequences + 1, dtype=torch.int32) * keys,
        "is_causal": True,
    }


def _ragged(
    draw: Draw, sequences: int, heads: int, queries: int, keys: int, head_dim: int, group: int = 2
) -> Arguments:
    """The second sequence has keys but no query, the third a query but no keys."""
    head_dim = min(head_dim, MAX_HEAD_DIM - 8)
    counts_q = (queries + torch.arange(sequences)) * (torch.arange(sequences) % 4 != 1)
    counts_k = (keys - torch.arange(sequences)).clamp(min=0) * (torch.arange(sequences) % 4 != 2)
    bounds = [torch.cat([counts.new_zeros(1), counts.cumsum(0)]).int() for counts in (counts_q, counts_k)]
    return {
        "query": draw(int(bounds[0][-1]), group * heads, head_dim),
        "key": draw(int(bounds[1][-1]), heads, head_dim),
        "value": draw(int(bounds[1][-1]), heads, head_dim + 8),
        "cu_seqlens_q": bounds[0],
        "cu_seqlens_k": bounds[1],
    }


def _unread_sequences(arguments: Arguments) -> Arguments:
    changed = {name: arguments[name].clone() for name in _QKV}
    bounds_q, bounds_k = (arguments[name].tolist() for name in ("cu_seqlens_q", "cu_seqlens_k"))
    for number in range(len(bounds_q) - 1):
        rows, columns = (slice(*bounds[number : number + 2]) for bounds in (bounds_q, bounds_k))
        if rows.start == rows.stop:
            changed["key"][columns], changed["value"][columns] = torch.nan, torch.inf
        if columns.start == columns.stop:
            changed["query"][rows] = torch.nan
    return arguments | changed


def _meaning(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, **given: Any
) -> Tensor:
    outs = [query[:0, :, :1] * key[:0, :1, :1].sum(0) * value.sum((0, 1))]
    bounds_q, bounds_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for number in range(len(bounds_q) - 1):
        rows, columns = (slice(*bounds[number : number + 2]) for bounds in (bounds_q, bounds_k))
        parts = (tensor.transpose(0, 1)[None] for tensor in (query[rows], key[columns], value[columns]))
        outs.append(reference.cross_attention(*parts, **given)[0][0].transpose(0, 1))
    return torch.cat(outs)


CASES = [
    Case(
        "cross_attention_varlen",
        name,
        make,
        _meaning,
        _QKV,
        sizes={"sequences": 3, "queries": 5, "keys": 9, "heads": 2, "head_dim": 16} | wider,
        larger={"sequences": 4, "queries": 17, "keys": 70, "heads": 2, "head_dim": 40} | wider,
        not_zero=("heads", "head_dim"),
        unread=_unread_sequences,
        numbers_only=name != "",
    )
    for name, make, wider in (
        ("", _packed, {}),
        ("ragged", _ragged, {}),
        ("wide heads", _ragged, {"sequences": 2, "heads": 1, "queries": 2, "keys": 5, "head_dim": 488}),
    )
]
