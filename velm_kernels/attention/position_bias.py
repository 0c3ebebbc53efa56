"""Relative positions of a grid of queries and one of keys, decomposed into rows and columns."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from velm_kernels import checks


def decomposed_position_bias(
    query: Tensor,
    rel_pos_height: Tensor,
    rel_pos_width: Tensor,
    query_size: tuple[int, int],
    key_size: tuple[int, int] | None = None,
) -> tuple[Tensor, Tensor]:
    """The ``rel_pos_height`` and ``rel_pos_width`` of :func:`velm_kernels.cross_attention` from the tables of a model.

    Query (y, x) and key (v, u) of two grids have the bias ``query . (table_height[y - v + key_height - 1] +
    table_width[x - u + key_width - 1])``, which is a part of the row v and one of the column u. Where one grid is finer
    than the other, its coordinates count as many of the coarser one's as lie in one of its steps. A table of another
    length than ``2 * max(query_height, key_height) - 1`` is interpolated to that. (MViTv2, Li et al., 2022, section
    4.1; as ViTDet and SAM compute it.)

    Args:
        query: ``(batch, heads, query_height * query_width, head_dim)``, neither scaled nor normalised.
        rel_pos_height, rel_pos_width: ``(distances, head_dim)`` in query's dtype, the tables, from the most negative
            distance on.
        query_size: ``(query_height, query_width)``.
        key_size: ``(key_height, key_width)``, those of the queries where it is not given.

    Returns:
        ``(batch, heads, queries, key_height)`` and ``(batch, heads, queries, key_width)`` in query's dtype (under
        autocast in its dtype), by two matrix products of torch: differentiable to any order.

    Raises:
        TypeError, ValueError: an argument has a wrong type, dtype or shape.

    Example:
        >>> query, key = torch.randn(2, 12, 14 * 14, 64), torch.randn(2, 12, 14 * 14, 64)
        >>> tables = torch.randn(27, 64), torch.randn(27, 64)
        >>> height, width = velm_kernels.decomposed_position_bias(query, *tables, (14, 14))
        >>> height.shape, width.shape
        (torch.Size([2, 12, 196, 14]), torch.Size([2, 12, 196, 14]))
        >>> out = velm_kernels.cross_attention(query, key, key, rel_pos_height=height, rel_pos_width=width)
    """
    checks.tensor("query", query, dims=4, layout="(batch, heads, queries, head_dim)")
    checks.dtype_in("query", query, checks.FLOAT_DTYPES)
    query_height, query_width = _size("query_size", query_size)
    key_height, key_width = (query_height, query_width) if key_size is None else _size("key_size", key_size)
    queries, head_dim = query.shape[2:]
    if query_height * query_width != queries:
        raise ValueError(
            f"query_size: expected query_height * query_width = {queries} queries of query {tuple(query.shape)}, "
            f"given {(query_height, query_width)}"
        )
    for name, table in (("rel_pos_height", rel_pos_height), ("rel_pos_width", rel_pos_width)):
        checks.tensor(name, table, dims=2, layout="(distances, head_dim)")
        checks.dtype_in(name, table, (query.dtype,))
        checks.shape(name, table, "(distances, head_dim)", (max(1, table.shape[0]), head_dim))
        checks.same_device(name, table, "query", query)
    grid = query.unflatten(2, (query_height, query_width))
    height = torch.einsum("bnyxd,yvd->bnyxv", grid, _of_pairs(rel_pos_height, query_height, key_height))
    width = torch.einsum("bnyxd,xud->bnyxu", grid, _of_pairs(rel_pos_width, query_width, key_width))
    return height.flatten(2, 3), width.flatten(2, 3)


def _size(name: str, given: tuple[int, int]) -> tuple[int, int]:
    if not isinstance(given, (tuple, list)) or len(given) != 2:
        raise TypeError(f"{name}: expected (height, width), given {given!r}")
    for size in given:
        checks.integer(name, size, 0, 2**31 - 1)
    return given[0], given[1]


def _of_pairs(table: Tensor, queries: int, keys: int) -> Tensor:
    """``(queries, keys, head_dim)``: the entry of the table for each pair of coordinates along one side."""
    distances = 2 * max(queries, keys) - 1
    if distances < 1:
        return table.new_zeros(queries, keys, table.shape[1])
    if table.shape[0] != distances:
        table = F.interpolate(table.t()[None], size=distances, mode="linear")[0].t()
    finer_keys, finer_queries = max(keys / max(queries, 1), 1.0), max(queries / max(keys, 1), 1.0)
    of_query = torch.arange(queries, device=table.device)[:, None] * finer_keys
    of_key = torch.arange(keys, device=table.device)[None, :] * finer_queries
    return table[(of_query - of_key + (keys - 1) * finer_queries).long()]
