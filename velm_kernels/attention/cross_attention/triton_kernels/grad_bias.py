"""Triton kernels of the attention backward pass: gradient of a bias that was broadcast."""

from __future__ import annotations

import triton
import triton.language as tl

from velm_kernels.attention.triton_kernels.products import product_of_rows, row_of, rows
from velm_kernels.attention.triton_kernels.tiles import (
    grad_scores,
    key_rows_ok,
    probabilities,
    query_block,
    scores,
    unless_infinite,
)
from velm_kernels.triton.kernels import to_int64


@triton.jit
def grad_bias_kernel(
    query,
    key,
    value,
    grad_out,
    logsumexp,
    shift,
    delta,
    partial,
    query_strides,
    key_strides,
    value_strides,
    grad_out_strides,
    logsumexp_strides,
    masks,
    dropout,
    scaling,
    sizes,
    bias_heads,
    row_tiles,
    column_tiles,
    batch_steps,
    head_steps,
    row_steps,
    column_steps,
    splits,
    steps_each,
    elements,
    CAUSAL: tl.constexpr,
    SUMS_ROWS: tl.constexpr,
    SUMS_COLUMNS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    INT64: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile of the bias: sums the score gradients of everything it was broadcast to, always in the same order.

    The sum runs over `batch_steps` x `head_steps` x `row_steps` x `column_steps` score tiles, of which a program takes
    `steps_each` into `partial` (splits, elements of the bias); `sum_partials_kernel` adds those."""
    tile = tl.program_id(0) // splits
    split = tl.program_id(0) % splits
    column_tile = tile % column_tiles
    row_tile = (tile // column_tiles) % row_tiles
    bias_head = (tile // column_tiles // row_tiles) % bias_heads
    bias_batch = tile // column_tiles // row_tiles // bias_heads
    queries = sizes.queries
    keys = sizes.keys
    b_i = tl.arange(0, BLOCK_M)
    b_j = tl.arange(0, BLOCK_N)
    b_sum = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    first = split * steps_each
    last = tl.minimum(first + steps_each, batch_steps * head_steps * row_steps * column_steps)
    for step in tl.range(first, last):
        # One of each pair is 0.
        start_n = (column_tile + step % column_steps) * BLOCK_N
        start_m = (row_tile + (step // column_steps) % row_steps) * BLOCK_M
        head = bias_head + (step // column_steps // row_steps) % head_steps
        b = bias_batch + step // column_steps // row_steps // head_steps
        b_m = start_m + b_i
        b_in = b_m < queries
        block, _full_lo, _full_hi = query_block(masks, b, head, b * queries, queries, keys, b_m, CAUSAL)
        wanted = True
        if CAUSAL or (masks.lengths is not None) or (masks.range_start is not None):
            wanted = (block.lo < start_n + BLOCK_N) & (block.hi > start_n)
        if wanted:
            kv_head = head // sizes.group
            p_q = row_of(query, query_strides, b, head, start_m)
            p_do = row_of(grad_out, grad_out_strides, b, head, start_m)
            p_k = row_of(key, key_strides, b, kv_head, start_n)
            p_v = row_of(value, value_strides, b, kv_head, start_n)
            lse_at = to_int64(b) * logsumexp_strides.batch + to_int64(head) * logsumexp_strides.head
            b_ok = key_rows_ok(masks, b, start_n, block.lo, block.hi, BLOCK_N, True)
            q = rows(p_q, b_i, query_strides.row, b_in, HEAD_DIM, BLOCK_D, INT64)
            do = rows(p_do, b_i, grad_out_strides.row, b_in, VALUE_DIM, BLOCK_DV, INT64)
            k = rows(p_k, b_j, key_strides.row, b_ok, HEAD_DIM, BLOCK_D, INT64)
            v = rows(p_v, b_j, value_strides.row, b_ok, VALUE_DIM, BLOCK_DV, INT64)
            b_lse = unless_infinite(tl.load(logsumexp + lse_at + b_m, mask=b_in, other=-float("inf")))[:, None]
            b_delta = tl.load(delta + lse_at + b_m, mask=b_in, other=0.0)
            b_qk = product_of_rows(q, k, HEAD_DIM, BLOCK_D, PRECISION)
            b_s = scores(masks, scaling, block, b_qk, b_ok, start_n, True, False, False, BLOCK_N)
            head_index = b * sizes.heads + head
            b_shift = tl.load(shift + lse_at + b_m, mask=b_in, other=0.0)[:, None]
            b_p = probabilities(b_s, b_lse, b_shift, dropout, head_index, b_m, start_n, True, True, BLOCK_N, False)
            b_dp = product_of_rows(do, v, VALUE_DIM, BLOCK_DV, PRECISION)
            b_sum += grad_scores(b_p, b_dp, b_delta[:, None], dropout, True)

    bias_rows = queries
    bias_columns = keys
    if SUMS_ROWS:
        bias_rows = 1
    if SUMS_COLUMNS:
        bias_columns = 1
    p_tile = (
        partial
        + to_int64(split) * elements
        + (to_int64(bias_batch) * bias_heads + bias_head) * bias_rows * bias_columns
    )
    b_m = row_tile * BLOCK_M + b_i
    b_n = column_tile * BLOCK_N + b_j
    if SUMS_ROWS and SUMS_COLUMNS:
        tl.store(p_tile, tl.sum(tl.sum(b_sum, 1), 0))
    elif SUMS_ROWS:
        tl.store(p_tile + b_n, tl.sum(b_sum, 0), mask=b_n < keys)
    elif SUMS_COLUMNS:
        tl.store(p_tile + b_m, tl.sum(b_sum, 1), mask=b_m < queries)
    else:
        tl.store(
            p_tile + to_int64(b_m)[:, None] * keys + b_n[None, :],
            b_sum,
            mask=(b_m < queries)[:, None] & (b_n < keys)[None, :],
        )
