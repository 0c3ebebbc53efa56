"""Triton kernels of topk_similarity: the best of each query in a part of the database, the similarities of pairs, and
the gradients of these.

What is found is a key, int64: above, a number that rises with the similarity, NaN highest (of distances, which are
turned, lowest), and below it one that falls with the index; so that no two are equal and the greatest are the best.
"""

from __future__ import annotations

import triton
import triton.language as tl

from velm_kernels.triton.kernels import product_add, round_to, to_int64

DOT, COSINE, L2 = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
LEAST_NORM = tl.constexpr(1e-12)
# Below every key of a row.
EMPTY = tl.constexpr(-(1 << 63))


@triton.jit
def _inverse_norm(b_squares):
    """NaN stays."""
    b_norm = tl.sqrt(b_squares)
    return 1.0 / tl.where(b_norm < LEAST_NORM, LEAST_NORM, b_norm)


@triton.jit
def topk_keys_kernel(
    queries,
    database,
    valid,
    tie,
    keys,
    count,
    rows,
    dim,
    query_stride,
    row_stride,
    splits,
    METRIC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    KEPT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """keys (count, splits, KEPT): of a block of queries and every `splits`-th tile of the database. tie (rows,) int32:
    the order of equal similarities, or None for that of rows."""
    split = tl.program_id(0) % splits
    b_i = (tl.program_id(0) // splits) * BLOCK_M + tl.arange(0, BLOCK_M)
    b_in = b_i < count
    b_slot = tl.arange(0, KEPT)
    b_list = tl.zeros((BLOCK_M, KEPT), tl.int64) + (b_slot.to(tl.int64) + EMPTY)[None, :]
    p_queries = queries + to_int64(b_i)[:, None] * query_stride
    for start in tl.range(split * BLOCK_N, rows, splits * BLOCK_N):
        b_j = start + tl.arange(0, BLOCK_N)
        b_ok = b_j < rows
        if valid is not None:
            b_ok = b_ok & (tl.load(valid + b_j, mask=b_ok, other=0) != 0)
        p_rows = database + to_int64(b_j)[None, :] * row_stride
        b_z = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        b_qq = tl.zeros((BLOCK_M,), tl.float32)
        b_dd = tl.zeros((BLOCK_N,), tl.float32)
        for first in tl.range(0, dim, BLOCK_K):
            b_k = first + tl.arange(0, BLOCK_K)
            b_q = tl.load(p_queries + b_k[None, :], mask=b_in[:, None] & (b_k < dim)[None, :], other=0.0)
            b_d = tl.load(p_rows + b_k[:, None], mask=b_ok[None, :] & (b_k < dim)[:, None], other=0.0)
            b_z = product_add(b_q, b_d, b_z, PRECISION)
            if METRIC != DOT:
                b_wide_q, b_wide_d = b_q.to(tl.float32), b_d.to(tl.float32)
                b_qq += tl.sum(b_wide_q * b_wide_q, 1)
                b_dd += tl.sum(b_wide_d * b_wide_d, 0)
        if METRIC == COSINE:
            b_z = (b_z * _inverse_norm(b_qq)[:, None]) * _inverse_norm(b_dd)[None, :]
        if METRIC == L2:
            b_distance = (b_qq[:, None] + b_dd[None, :]) - 2.0 * b_z
            # Of infinite rows the difference is infinite, not that of infinities.
            b_is_nan = (b_qq != b_qq)[:, None] | (b_dd != b_dd)[None, :]
            b_lost = (b_distance != b_distance) & (b_is_nan == 0)
            b_z = 0.0 - tl.where(b_lost, float("inf"), b_distance)
        b_bits = (b_z + 0.0).to(tl.int32, bitcast=True)
        b_rank = to_int64(b_bits ^ ((b_bits >> 31) & 0x7FFFFFFF))
        b_rank = tl.where(b_z != b_z, -2147483647 if METRIC == L2 else 2147483647, b_rank)
        if tie is not None:
            b_after = tl.load(tie + b_j, mask=b_ok, other=0)
        else:
            b_after = b_j
        b_key = b_rank * 4294967296 + (2147483647 - to_int64(b_after))[None, :]
        b_least = tl.min(b_list, 1)
        b_key = tl.where(b_ok[None, :] & (b_key > b_least[:, None]), b_key, EMPTY)
        while tl.max(tl.max(b_key, 1), 0) > EMPTY:
            b_best = tl.max(b_key, 1)
            b_list = tl.where((b_list == b_least[:, None]) & (b_best > b_least)[:, None], b_best[:, None], b_list)
            b_least = tl.min(b_list, 1)
            b_key = tl.where((b_key < b_best[:, None]) & (b_key > b_least[:, None]), b_key, EMPTY)
    p_keys = keys + (to_int64(b_i) * splits + split)[:, None] * KEPT + b_slot[None, :]
    tl.store(p_keys, b_list, mask=b_in[:, None])


@triton.jit
def topk_pairs_kernel(
    queries,
    database,
    places,
    grad,
    values,
    factors,
    own_query,
    own_row,
    k,
    dim,
    query_stride,
    row_stride,
    METRIC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The similarity of a query and a row that was found, values (queries * k,), or, where `grad` comes in, what its
    gradient multiplies the other row and the own one by: factors, own_query, own_row."""
    pair = to_int64(tl.program_id(0))
    place = tl.load(places + pair)
    p_query = queries + (pair // k) * query_stride
    p_row = database + tl.maximum(place, 0) * row_stride
    length = tl.where(place >= 0, dim, 0)
    b_z = tl.zeros((BLOCK,), tl.float32)
    b_qq = tl.zeros((BLOCK,), tl.float32)
    b_dd = tl.zeros((BLOCK,), tl.float32)
    for first in tl.range(0, dim, BLOCK):
        b_k = first + tl.arange(0, BLOCK)
        b_q = tl.load(p_query + b_k, mask=b_k < length, other=0.0).to(tl.float32)
        b_d = tl.load(p_row + b_k, mask=b_k < length, other=0.0).to(tl.float32)
        if METRIC == L2:
            b_z += (b_q - b_d) * (b_q - b_d)
        else:
            b_z += b_q * b_d
        if METRIC == COSINE:
            b_qq += b_q * b_q
            b_dd += b_d * b_d
    z = tl.sum(b_z, 0)
    if METRIC == COSINE:
        qq, dd = tl.sum(b_qq, 0), tl.sum(b_dd, 0)
        of_query, of_row = _inverse_norm(qq), _inverse_norm(dd)
        z = (z * of_query) * of_row
        if grad is not None:
            g = tl.load(grad + pair)
            tl.store(factors + pair, g * of_query * of_row)
            # A row that is not longer than the least norm is divided by that and not by its own.
            tl.store(own_query + pair, tl.where(tl.sqrt(qq) <= LEAST_NORM, 0.0, -g * z * of_query * of_query))
            tl.store(own_row + pair, tl.where(tl.sqrt(dd) <= LEAST_NORM, 0.0, -g * z * of_row * of_row))
    if values is not None:
        tl.store(values + pair, z)


@triton.jit
def topk_gradient_kernel(
    x,
    y,
    places,
    order,
    stops,
    factors,
    own,
    out,
    k,
    dim,
    x_stride,
    y_stride,
    column_blocks,
    METRIC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Of queries, x, the sum over the rows that each has found; with `order`, pairs sorted by row, of rows, x, the sum
    over the queries that have found it, by the program of its first pair. `stops` say where those of a row end, for
    other pairs than the first 0."""
    item = to_int64(tl.program_id(0) // column_blocks)
    b_k = (tl.program_id(0) % column_blocks) * BLOCK + tl.arange(0, BLOCK)
    if order is not None:
        start, stop = item, tl.load(stops + item)
        row = tl.load(places + tl.load(order + item))
        length = tl.where(stop > start, dim, 0)
    else:
        start, stop = item * k, item * k + k
        row = item
        length = dim
    b_mine = b_k < length
    b_x = tl.load(x + row * x_stride + b_k, mask=b_mine, other=0.0).to(tl.float32)
    b_sum = tl.zeros((BLOCK,), tl.float32)
    for number in tl.range(start, stop):
        if order is not None:
            pair = tl.load(order + number)
            other = pair // k
        else:
            pair = number
            other = tl.load(places + pair)
        # Nothing is read where nothing was found.
        b_there = b_k < tl.where(other >= 0, length, 0)
        b_y = tl.load(y + other * y_stride + b_k, mask=b_there, other=0.0).to(tl.float32)
        factor = tl.load(factors + pair)
        if METRIC == L2:
            b_term = 2.0 * factor * (b_x - b_y)
        elif METRIC == COSINE:
            b_term = factor * b_y + tl.load(own + pair) * b_x
        else:
            b_term = factor * b_y
        b_sum += tl.where(b_there, b_term, 0.0)
    tl.store(out + row * dim + b_k, round_to(b_sum, out.dtype.element_ty), mask=b_mine)
