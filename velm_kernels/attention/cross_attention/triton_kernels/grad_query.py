"""Triton kernels of the attention backward pass: delta of each row, and the gradient of query."""

from __future__ import annotations

import triton
import triton.language as tl

from velm_kernels.attention.triton_kernels.products import (
    add_seen,
    add_weighted,
    has_nan,
    product_of_rows,
    report_nan,
    row_of,
    rows,
    store_rows,
    zero_pieces,
)
from velm_kernels.attention.triton_kernels.tiles import (
    LOWEST,
    PAST_END,
    extents,
    grad_products,
    grad_scores,
    key_rows_ok,
    key_tiles,
    matrix_rows,
    probabilities,
    query_block,
    scores,
    unless_infinite,
)
from velm_kernels.triton.kernels import round_to, to_int64


@triton.jit
def delta_kernel(
    grad_out,
    out,
    grad_logsumexp,
    logsumexp,
    delta,
    grad_out_strides,
    out_strides,
    grad_logsumexp_strides,
    logsumexp_strides,
    heads,
    queries,
    rows,
    VALUE_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """delta of every row from the result, in the layout of logsumexp: (batch, heads, queries) rows, or (heads, tokens)
    with batch 1."""
    b_row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    b_in = b_row < rows
    b = b_row // (heads * queries)
    b_head = (b_row // queries) % heads
    b_m = b_row % queries
    b_dv = tl.arange(0, BLOCK_DV)
    b_lse_at = to_int64(b) * logsumexp_strides.batch + to_int64(b_head) * logsumexp_strides.head + b_m
    # An empty row has no gradient, whatever stands in its grad_out.
    b_lse = tl.load(logsumexp + b_lse_at, mask=b_in, other=-float("inf"))
    p_do = (
        grad_out
        + to_int64(b) * grad_out_strides.batch
        + to_int64(b_head) * grad_out_strides.head
        + to_int64(b_m) * grad_out_strides.row
    )
    p_o = out + to_int64(b) * out_strides.batch + to_int64(b_head) * out_strides.head + to_int64(b_m) * out_strides.row
    b_column = (b_dv < VALUE_DIM)[None, :]
    b_o = tl.load(p_o[:, None] + b_dv[None, :], mask=b_in[:, None] & b_column, other=0.0).to(tl.float32)
    # Of an empty row it is 0, of one that sees nothing but -inf NaN.
    b_live = b_in & ((b_lse != -float("inf")) | (tl.max((b_o != 0.0).to(tl.int32), 1) != 0))
    b_do = tl.load(p_do[:, None] + b_dv[None, :], mask=b_live[:, None] & b_column, other=0.0).to(tl.float32)
    b_delta = tl.sum(b_do * b_o, 1)
    if grad_logsumexp is not None:
        p_dlse = (
            grad_logsumexp
            + to_int64(b) * grad_logsumexp_strides.batch
            + to_int64(b_head) * grad_logsumexp_strides.head
            + to_int64(b_m) * grad_logsumexp_strides.row
        )
        b_delta -= tl.load(p_dlse, mask=b_live, other=0.0)
    tl.store(delta + b_lse_at, b_delta, mask=b_in)


@triton.jit
def delta_of_products_kernel(
    query,
    key,
    value,
    grad_out,
    logsumexp,
    grad_logsumexp,
    shift,
    delta,
    query_strides,
    key_strides,
    value_strides,
    grad_out_strides,
    grad_logsumexp_strides,
    logsumexp_strides,
    masks,
    dropout,
    scaling,
    sizes,
    query_blocks,
    CAUSAL: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    INT64: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """delta of one block of rows from the products that it is subtracted from: the sum over keys of p * dp. The result
    was rounded, which in a row whose attention is nearly one key leaves nothing of dp - delta."""
    row_block = tl.program_id(0) % query_blocks
    head = (tl.program_id(0) // query_blocks) % sizes.heads
    b = tl.program_id(0) // query_blocks // sizes.heads
    kv_head = head // sizes.group
    e = extents(sizes, b)
    start_m = row_block * BLOCK_M
    if start_m >= e.queries:
        return
    b_i = tl.arange(0, BLOCK_M)
    b_j = tl.arange(0, BLOCK_N)
    b_m = start_m + b_i
    b_in = b_m < e.queries
    block, _full_lo, _full_hi = query_block(masks, b, head, e.first_row, e.queries, e.keys, b_m, CAUSAL)
    lse_at = to_int64(b) * logsumexp_strides.batch + to_int64(head) * logsumexp_strides.head + e.start_q
    b_lse = tl.load(logsumexp + lse_at + b_m, mask=b_in, other=-float("inf"))
    # An empty row has no gradient, whatever stands in its grad_out.
    b_live = b_lse != -float("inf")
    SHIFTS: tl.constexpr = shift is not None
    b_shift = b_lse[:, None]
    if SHIFTS:
        b_shift = tl.load(shift + lse_at + b_m, mask=b_in, other=0.0)[:, None]
    b_lse = unless_infinite(b_lse)[:, None]
    p_q = row_of(query, query_strides, b, head, e.start_q + start_m)
    p_do = row_of(grad_out, grad_out_strides, b, head, e.start_q + start_m)
    p_k = row_of(key, key_strides, b, kv_head, e.start_k)
    p_v = row_of(value, value_strides, b, kv_head, e.start_k)
    q = rows(p_q, b_i, query_strides.row, b_live, HEAD_DIM, BLOCK_D, INT64)
    do = rows(p_do, b_i, grad_out_strides.row, b_live, VALUE_DIM, BLOCK_DV, INT64)
    b_sum = tl.zeros((BLOCK_M,), tl.float32)
    for tile in tl.range(block.lo // BLOCK_N, tl.cdiv(block.hi, BLOCK_N)):
        start_n = tile * BLOCK_N
        b_ok = key_rows_ok(masks, b, start_n, block.lo, block.hi, BLOCK_N, True)
        k = rows(p_k + to_int64(start_n) * key_strides.row, b_j, key_strides.row, b_ok, HEAD_DIM, BLOCK_D, INT64)
        v = rows(p_v + to_int64(start_n) * value_strides.row, b_j, value_strides.row, b_ok, VALUE_DIM, BLOCK_DV, INT64)
        # [BM, BN]
        b_qk = product_of_rows(q, k, HEAD_DIM, BLOCK_D, PRECISION)
        b_s = scores(masks, scaling, block, b_qk, b_ok, start_n, True, False, False, BLOCK_N)
        head_index = b * sizes.heads + head
        b_p = probabilities(b_s, b_lse, b_shift, dropout, head_index, b_m, start_n, SHIFTS, True, BLOCK_N, False)
        b_dp = product_of_rows(do, v, VALUE_DIM, BLOCK_DV, PRECISION)
        b_sum += tl.sum(grad_scores(b_p, b_dp, tl.zeros((BLOCK_M, 1), tl.float32), dropout, True), 1)
    if grad_logsumexp is not None:
        p_dlse = row_of(grad_logsumexp, grad_logsumexp_strides, b, head, e.start_q)
        b_sum -= tl.load(p_dlse + to_int64(b_m) * grad_logsumexp_strides.row, mask=b_live & b_in, other=0.0)
    tl.store(delta + lse_at + b_m, b_sum, mask=b_in)


@triton.jit
def _grad_query_tiles(
    dq,
    q,
    do,
    b_lse,
    b_shift,
    b_delta,
    p_k,
    p_v,
    grad_bias,
    grad_bias_strides,
    stride_k,
    stride_v,
    masks,
    dropout,
    scaling,
    block,
    b_stores,
    b_head_index,
    part,
    first,
    last,
    SHIFTS: tl.constexpr,
    MASKED: tl.constexpr,
    GUARDED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    PARTS: tl.constexpr,
    INT64: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Adds the key tiles from `first` to `last` to the gradient of the (scaled) query. GUARDED: see
    `add_seen`."""
    HIDES: tl.constexpr = MASKED or (masks.key_mask is not None)
    b_j = tl.arange(0, BLOCK_N)
    for tile in tl.range(first, last):
        start_n = tile * BLOCK_N
        b_ok = key_rows_ok(masks, block.b, start_n, block.lo, block.hi, BLOCK_N, MASKED)
        k = rows(p_k + to_int64(start_n) * stride_k, b_j, stride_k, b_ok, HEAD_DIM, BLOCK_D, INT64)
        v = rows(p_v + to_int64(start_n) * stride_v, b_j, stride_v, b_ok, VALUE_DIM, BLOCK_DV, INT64)
        # [BM, BN]
        b_qk = product_of_rows(q, k, HEAD_DIM, BLOCK_D, PRECISION)
        b_s = scores(masks, scaling, block, b_qk, b_ok, start_n, MASKED, False, False, BLOCK_N)
        b_p = probabilities(
            b_s,
            b_lse[:, None],
            b_shift[:, None],
            dropout,
            b_head_index,
            block.b_m,
            start_n,
            SHIFTS,
            HIDES,
            BLOCK_N,
            False,
        )
        b_dp = product_of_rows(do, v, VALUE_DIM, BLOCK_DV, PRECISION)
        b_ds = grad_scores(b_p, b_dp, b_delta[:, None], dropout, HIDES)
        if (grad_bias is not None) and not GUARDED:
            p_ds_rows = matrix_rows(grad_bias, grad_bias_strides, block.b, block.b_head, block.b_m)
            p_tile = (p_ds_rows + start_n)[:, None] + b_j[None, :]
            b_inside = b_stores[:, None] & (start_n + b_j < block.keys)[None, :]
            tl.store(p_tile, round_to(b_ds, grad_bias.dtype.element_ty), mask=b_inside)
        b_dqk = grad_products(b_ds, b_p, b_qk, scaling, HIDES)
        b_dqk = round_to(b_dqk, p_k.dtype.element_ty)
        if GUARDED:
            dq = add_seen(dq, None, b_dqk, b_s != LOWEST, k, part, HEAD_DIM, BLOCK_D, PARTS, PRECISION)
        else:
            dq = add_weighted(dq, None, b_dqk, k, part, HEAD_DIM, BLOCK_D, PARTS, PRECISION)
    return dq


@triton.jit
def grad_query_kernel(
    query,
    key,
    value,
    grad_out,
    logsumexp,
    shift,
    delta,
    grad_query,
    grad_bias,
    flags,
    query_strides,
    key_strides,
    value_strides,
    grad_out_strides,
    grad_query_strides,
    grad_bias_strides,
    logsumexp_strides,
    masks,
    dropout,
    scaling,
    sizes,
    scale,
    query_blocks,
    CAUSAL: tl.constexpr,
    FIRST_PHASE: tl.constexpr,
    GUARDED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    PARTS: tl.constexpr,
    INT64: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One block of query rows, whose columns PARTS programs share. A bias that broadcasts nowhere gets its gradient
    here too, where `grad_bias` (zeros) is given. `flags` and GUARDED: see `report_nan`, FIRST_PHASE: `key_tiles`."""
    if GUARDED:  # noqa: SIM102
        if not has_nan(flags, BLOCK_M):
            return
    part = tl.program_id(0) % PARTS
    rest = tl.program_id(0) // PARTS
    row_block = rest % query_blocks
    head = (rest // query_blocks) % sizes.heads
    b = rest // query_blocks // sizes.heads
    if CAUSAL:
        row_block = query_blocks - 1 - row_block
    kv_head = head // sizes.group
    e = extents(sizes, b)
    start_m = row_block * BLOCK_M
    if start_m >= e.queries:
        return
    b_i = tl.arange(0, BLOCK_M)
    b_m = start_m + b_i
    b_in = b_m < e.queries
    block, full_lo, full_hi = query_block(masks, b, head, e.first_row, e.queries, e.keys, b_m, CAUSAL)
    bounds = key_tiles(block.lo, block.hi, full_lo, full_hi, BLOCK_N, FIRST_PHASE)

    first_q = e.start_q + start_m
    p_q = row_of(query, query_strides, b, head, first_q)
    p_do = row_of(grad_out, grad_out_strides, b, head, first_q)
    p_k = row_of(key, key_strides, b, kv_head, e.start_k)
    p_v = row_of(value, value_strides, b, kv_head, e.start_k)
    lse_at = to_int64(b) * logsumexp_strides.batch + to_int64(head) * logsumexp_strides.head + e.start_q
    b_lse = tl.load(logsumexp + lse_at + b_m, mask=b_in, other=PAST_END)
    b_delta = tl.load(delta + lse_at + b_m, mask=b_in, other=0.0)
    # [BM, D], [BM, DV]
    q = rows(p_q, b_i, query_strides.row, b_in, HEAD_DIM, BLOCK_D, INT64)
    do = rows(p_do, b_i, grad_out_strides.row, b_in, VALUE_DIM, BLOCK_DV, INT64)
    SHIFTS: tl.constexpr = shift is not None
    b_shift = b_lse
    if SHIFTS:
        b_shift = tl.load(shift + lse_at + b_m, mask=b_in, other=0.0)
    b_lse = unless_infinite(b_lse)
    dq = zero_pieces(BLOCK_M, HEAD_DIM, BLOCK_D, PARTS)
    for phase in tl.static_range(FIRST_PHASE, 3):
        dq = _grad_query_tiles(
            dq,
            q,
            do,
            b_lse,
            b_shift,
            b_delta,
            p_k,
            p_v,
            grad_bias,
            grad_bias_strides,
            key_strides.row,
            value_strides.row,
            masks,
            dropout,
            scaling,
            block,
            b_m < tl.where(part == 0, e.queries, 0),
            b * sizes.heads + head,
            part,
            bounds[phase],
            bounds[phase + 1],
            SHIFTS,
            phase != 1,
            GUARDED,
            HEAD_DIM,
            VALUE_DIM,
            BLOCK_N,
            BLOCK_D,
            BLOCK_DV,
            PARTS,
            INT64,
            PRECISION,
        )
    if flags is not None and not GUARDED:
        report_nan(flags, dq, BLOCK_M)
    if grad_query is not None:
        p_dq = row_of(grad_query, grad_query_strides, b, head, first_q)
        store_rows(p_dq, b_i, grad_query_strides.row, b_in, dq, scale, part, GUARDED, HEAD_DIM, BLOCK_D, PARTS, INT64)
