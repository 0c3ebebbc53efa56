"""Triton kernels of the attention backward pass: gradients of the biases of the rows and columns of a grid of keys."""

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
from velm_kernels.triton.kernels import product_add, round_to, to_int64


@triton.jit
def grad_rel_pos_kernel(
    query,
    key,
    value,
    grad_out,
    logsumexp,
    shift,
    delta,
    grad_height,
    grad_width,
    query_strides,
    key_strides,
    value_strides,
    grad_out_strides,
    logsumexp_strides,
    masks,
    dropout,
    scaling,
    sizes,
    heights,
    widths,
    height_blocks,
    blocks,
    query_blocks,
    CAUSAL: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    INT64: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One block of queries, and BLOCK_O rows of the grid or, from `height_blocks` of the `blocks` on, columns: the sums
    of the gradients of scores over their keys, by a product with a matrix of ones and zeros. Both gradients are
    contiguous (batch, heads, queries, `heights` or `widths`)."""
    part = tl.program_id(0) % blocks
    rest = tl.program_id(0) // blocks
    start_m = (rest % query_blocks) * BLOCK_M
    head = (rest // query_blocks) % sizes.heads
    b = rest // query_blocks // sizes.heads
    queries = sizes.queries
    of_rows = part < height_blocks
    first = tl.where(of_rows, part, part - height_blocks) * BLOCK_O
    b_i = tl.arange(0, BLOCK_M)
    b_j = tl.arange(0, BLOCK_N)
    b_o = first + tl.arange(0, BLOCK_O)
    b_m = start_m + b_i
    b_in = b_m < queries
    block, _full_lo, _full_hi = query_block(masks, b, head, b * queries, queries, sizes.keys, b_m, CAUSAL)
    lo = tl.maximum(block.lo, tl.where(of_rows, first * masks.key_width, 0))
    hi = tl.minimum(block.hi, tl.where(of_rows, (first + BLOCK_O) * masks.key_width, sizes.keys))
    p_k = row_of(key, key_strides, b, head // sizes.group, 0)
    p_v = row_of(value, value_strides, b, head // sizes.group, 0)
    p_q = row_of(query, query_strides, b, head, start_m)
    p_do = row_of(grad_out, grad_out_strides, b, head, start_m)
    q = rows(p_q, b_i, query_strides.row, b_in, HEAD_DIM, BLOCK_D, INT64)
    do = rows(p_do, b_i, grad_out_strides.row, b_in, VALUE_DIM, BLOCK_DV, INT64)
    lse_at = to_int64(b) * logsumexp_strides.batch + to_int64(head) * logsumexp_strides.head
    b_lse = unless_infinite(tl.load(logsumexp + lse_at + b_m, mask=b_in, other=-float("inf")))[:, None]
    b_delta = tl.load(delta + lse_at + b_m, mask=b_in, other=0.0)[:, None]
    b_shift = tl.load(shift + lse_at + b_m, mask=b_in, other=0.0)[:, None]
    b_sum = tl.zeros((BLOCK_M, BLOCK_O), tl.float32)
    for tile in tl.range(lo // BLOCK_N, tl.cdiv(hi, BLOCK_N)):
        start_n = tile * BLOCK_N
        b_ok = key_rows_ok(masks, b, start_n, block.lo, block.hi, BLOCK_N, True)
        k = rows(p_k + to_int64(start_n) * key_strides.row, b_j, key_strides.row, b_ok, HEAD_DIM, BLOCK_D, INT64)
        v = rows(p_v + to_int64(start_n) * value_strides.row, b_j, value_strides.row, b_ok, VALUE_DIM, BLOCK_DV, INT64)
        b_qk = product_of_rows(q, k, HEAD_DIM, BLOCK_D, PRECISION)
        b_s = scores(masks, scaling, block, b_qk, b_ok, start_n, True, False, False, BLOCK_N)
        head_index = b * sizes.heads + head
        b_p = probabilities(b_s, b_lse, b_shift, dropout, head_index, b_m, start_n, True, True, BLOCK_N, False)
        b_dp = product_of_rows(do, v, VALUE_DIM, BLOCK_DV, PRECISION)
        b_ds = grad_scores(b_p, b_dp, b_delta, dropout, True)
        b_n = start_n + b_j
        b_place = tl.where(of_rows, b_n // masks.key_width, b_n % masks.key_width)
        if tl.max(tl.max(((b_ds - b_ds) != 0.0).to(tl.int32), 1), 0) != 0:
            # 0 times what is not finite would be NaN: each sum has the terms of its own keys and no others.
            for j in tl.range(0, BLOCK_N):
                b_term = tl.sum(tl.where((b_j == j)[None, :], b_ds, 0.0), 1)
                place = tl.sum(tl.where(b_j == j, b_place, 0), 0)
                b_sum = tl.where((b_o == place)[None, :], b_sum + b_term[:, None], b_sum)
        else:
            b_ones = (b_place[:, None] == b_o[None, :]).to(tl.float32)
            b_sum = product_add(b_ds, b_ones, b_sum, PRECISION)
    b_row = (to_int64(b) * sizes.heads + head) * queries + b_m
    if of_rows:
        if grad_height is not None:
            p_grad = grad_height + (b_row * heights)[:, None] + b_o[None, :]
            b_ok = b_in[:, None] & (b_o < heights)[None, :]
            tl.store(p_grad, round_to(b_sum, grad_height.dtype.element_ty), mask=b_ok)
    else:
        if grad_width is not None:
            p_grad = grad_width + (b_row * widths)[:, None] + b_o[None, :]
            b_ok = b_in[:, None] & (b_o < widths)[None, :]
            tl.store(p_grad, round_to(b_sum, grad_width.dtype.element_ty), mask=b_ok)
