"""Triton kernels of the attention backward pass: delta of each row, and the gradient of query."""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_tiles import (
    base2,
    block_bounds,
    grad_scores,
    kept,
    key_rows_ok,
    load_rows,
    product,
    product_add,
    round_to,
    row_bounds,
    scores,
    sequence,
    store_rows,
    wide,
)


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
    """delta of every row, in the layout of logsumexp: (batch, heads, queries) rows, or (heads, tokens) with batch 1."""
    b_row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    b_in = b_row < rows
    b = b_row // (heads * queries)
    b_head = (b_row // queries) % heads
    b_m = b_row % queries
    b_dv = tl.arange(0, BLOCK_DV)
    b_lse_at = wide(b) * logsumexp_strides.batch + wide(b_head) * logsumexp_strides.head + b_m
    # An empty row has no gradient, whatever stands in its grad_out.
    b_live = b_in & (tl.load(logsumexp + b_lse_at, mask=b_in, other=-float("inf")) != -float("inf"))
    b_ok = b_live[:, None] & (b_dv < VALUE_DIM)[None, :]
    p_do = (
        grad_out
        + wide(b) * grad_out_strides.batch
        + wide(b_head) * grad_out_strides.head
        + wide(b_m) * grad_out_strides.row
    )
    p_o = out + wide(b) * out_strides.batch + wide(b_head) * out_strides.head + wide(b_m) * out_strides.row
    b_do = tl.load(p_do[:, None] + b_dv[None, :], mask=b_ok, other=0.0).to(tl.float32)
    b_o = tl.load(p_o[:, None] + b_dv[None, :], mask=b_ok, other=0.0).to(tl.float32)
    b_delta = tl.sum(b_do * b_o, 1)
    if grad_logsumexp is not None:
        p_dlse = (
            grad_logsumexp
            + wide(b) * grad_logsumexp_strides.batch
            + wide(b_head) * grad_logsumexp_strides.head
            + wide(b_m) * grad_logsumexp_strides.row
        )
        b_delta -= tl.load(p_dlse, mask=b_live, other=0.0)
    tl.store(delta + b_lse_at, b_delta, mask=b_in)


@triton.jit
def _grad_query_tiles(
    b_dq,
    b_q,
    b_do,
    b_lse,
    b_delta,
    p_k,
    p_v,
    p_ds,
    stride_k,
    stride_v,
    grad_bias_strides,
    masks,
    scaling,
    b,
    head,
    b_m,
    b_lo,
    b_hi,
    lo,
    hi,
    start,
    stop,
    queries,
    keys,
    heads,
    MASKED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    HIDES: tl.constexpr = (masks.mask is not None) or (masks.bias is not None)
    HIDES_COLUMNS: tl.constexpr = HIDES or (MASKED and masks.range_start is not None)
    READS_SOME: tl.constexpr = MASKED or (masks.key_mask is not None)
    b_j = tl.arange(0, BLOCK_N)
    for start_n in tl.range(start, stop, BLOCK_N):
        b_n = start_n + b_j
        b_ok = key_rows_ok(masks, b, b_n, lo, hi, keys, MASKED)
        b_k = load_rows(p_k + wide(start_n) * stride_k, b_j, stride_k, b_ok, HEAD_DIM, BLOCK_D, READS_SOME, WIDE)
        b_v = load_rows(p_v + wide(start_n) * stride_v, b_j, stride_v, b_ok, VALUE_DIM, BLOCK_DV, READS_SOME, WIDE)
        # [BM, BN]
        b_s, b_visible, b_tanh = scores(
            masks,
            scaling,
            product(b_q, tl.trans(b_k), PRECISION),
            b_ok,
            b,
            head,
            b_m[:, None],
            b_n[None, :],
            b_lo[:, None],
            b_hi[:, None],
            keys,
            queries,
            MASKED,
            False,
            WIDE,
        )
        b_p = tl.exp2(b_s - b_lse[:, None])
        b_dp = product(b_do, tl.trans(b_v), PRECISION)
        b_keep: tl.constexpr = None
        if masks.seed is not None:
            b_keep = kept(
                masks.seed, masks.drop_below, masks.direction, b * heads + head, b_m[:, None], start_n, BLOCK_N, False
            )
        b_ds, b_dqk = grad_scores(b_p, b_dp, b_delta[:, None], b_visible, b_tanh, b_keep, masks.keep_scale)
        if p_ds is not None:
            p_tile = p_ds + wide(b_m)[:, None] * grad_bias_strides.row + b_n[None, :]
            tl.store(
                p_tile, round_to(b_ds, p_ds.dtype.element_ty), mask=(b_m < queries)[:, None] & (b_n < keys)[None, :]
            )
        if HIDES_COLUMNS:
            # A key that no row of this block sees may be NaN, which 0 would not silence.
            b_seen = tl.max(b_visible.to(tl.int32), 0) > 0
            b_k = tl.where(b_seen[:, None], b_k, tl.zeros_like(b_k))
        b_dq = product_add(round_to(b_dqk, p_k.dtype.element_ty), b_k, b_dq, PRECISION)
    return b_dq


@triton.jit
def grad_query_kernel(
    query,
    key,
    value,
    grad_out,
    logsumexp,
    delta,
    grad_query,
    grad_bias,
    query_strides,
    key_strides,
    value_strides,
    grad_out_strides,
    grad_query_strides,
    grad_bias_strides,
    logsumexp_strides,
    masks,
    scaling,
    sizes,
    scale,
    query_blocks,
    CAUSAL: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One block of query rows. A bias that broadcasts nowhere gets its gradient here too, where `grad_bias` (zeros) is
    given."""
    block = tl.program_id(0) % query_blocks
    head = (tl.program_id(0) // query_blocks) % sizes.heads
    b = tl.program_id(0) // query_blocks // sizes.heads
    if CAUSAL:
        block = query_blocks - 1 - block
    kv_head = head // sizes.group
    start_q, queries = sequence(sizes.cu_seqlens_q, b, sizes.queries)
    start_k, keys = sequence(sizes.cu_seqlens_k, b, sizes.keys)
    if sizes.cu_seqlens_q is None:
        first_row = b * queries
    else:
        first_row = start_q
    start_m = block * BLOCK_M
    if start_m >= queries:
        return
    b_i = tl.arange(0, BLOCK_M)
    b_m = start_m + b_i
    b_in = b_m < queries
    b_lo, b_hi = row_bounds(masks, b, first_row, queries, keys, b_m, CAUSAL)
    lo, hi, full_lo, full_hi = block_bounds(b_lo, b_hi, b_in)
    start = (lo // BLOCK_N) * BLOCK_N
    stop = tl.maximum(hi, start)
    full_start = tl.minimum(tl.maximum(tl.cdiv(full_lo, BLOCK_N) * BLOCK_N, start), stop)
    full_stop = tl.maximum((tl.minimum(full_hi, hi) // BLOCK_N) * BLOCK_N, full_start)

    first_q = wide(start_q + start_m)
    p_q = query + wide(b) * query_strides.batch + wide(head) * query_strides.head + first_q * query_strides.row
    p_do = (
        grad_out
        + wide(b) * grad_out_strides.batch
        + wide(head) * grad_out_strides.head
        + first_q * grad_out_strides.row
    )
    p_k = key + wide(b) * key_strides.batch + wide(kv_head) * key_strides.head + wide(start_k) * key_strides.row
    p_v = value + wide(b) * value_strides.batch + wide(kv_head) * value_strides.head + wide(start_k) * value_strides.row
    lse_at = wide(b) * logsumexp_strides.batch + wide(head) * logsumexp_strides.head + start_q
    if grad_bias is not None:
        p_ds = grad_bias + wide(b) * grad_bias_strides.batch + wide(head) * grad_bias_strides.head
    else:
        p_ds: tl.constexpr = None
    b_lse = tl.load(logsumexp + lse_at + b_m, mask=b_in, other=-float("inf"))
    b_delta = tl.load(delta + lse_at + b_m, mask=b_in, other=0.0)
    # [BM, D], [BM, DV]
    b_q = load_rows(p_q, b_i, query_strides.row, b_in, HEAD_DIM, BLOCK_D, True, WIDE)
    b_do = load_rows(p_do, b_i, grad_out_strides.row, b_in, VALUE_DIM, BLOCK_DV, True, WIDE)
    b_lse = base2(b_lse)
    b_dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    if masks.range_start is not None:
        b_dq = _grad_query_tiles(
            b_dq,
            b_q,
            b_do,
            b_lse,
            b_delta,
            p_k,
            p_v,
            p_ds,
            key_strides.row,
            value_strides.row,
            grad_bias_strides,
            masks,
            scaling,
            b,
            head,
            b_m,
            b_lo,
            b_hi,
            lo,
            hi,
            start,
            full_start,
            queries,
            keys,
            sizes.heads,
            True,
            HEAD_DIM,
            VALUE_DIM,
            BLOCK_N,
            BLOCK_D,
            BLOCK_DV,
            WIDE,
            PRECISION,
        )
    b_dq = _grad_query_tiles(
        b_dq,
        b_q,
        b_do,
        b_lse,
        b_delta,
        p_k,
        p_v,
        p_ds,
        key_strides.row,
        value_strides.row,
        grad_bias_strides,
        masks,
        scaling,
        b,
        head,
        b_m,
        b_lo,
        b_hi,
        lo,
        hi,
        full_start,
        full_stop,
        queries,
        keys,
        sizes.heads,
        False,
        HEAD_DIM,
        VALUE_DIM,
        BLOCK_N,
        BLOCK_D,
        BLOCK_DV,
        WIDE,
        PRECISION,
    )
    b_dq = _grad_query_tiles(
        b_dq,
        b_q,
        b_do,
        b_lse,
        b_delta,
        p_k,
        p_v,
        p_ds,
        key_strides.row,
        value_strides.row,
        grad_bias_strides,
        masks,
        scaling,
        b,
        head,
        b_m,
        b_lo,
        b_hi,
        lo,
        hi,
        full_stop,
        stop,
        queries,
        keys,
        sizes.heads,
        True,
        HEAD_DIM,
        VALUE_DIM,
        BLOCK_N,
        BLOCK_D,
        BLOCK_DV,
        WIDE,
        PRECISION,
    )
    if grad_query is not None:
        p_dq = (
            grad_query
            + wide(b) * grad_query_strides.batch
            + wide(head) * grad_query_strides.head
            + first_q * grad_query_strides.row
        )
        store_rows(p_dq, b_i, grad_query_strides.row, b_in, b_dq * scale, HEAD_DIM, BLOCK_D, WIDE)
