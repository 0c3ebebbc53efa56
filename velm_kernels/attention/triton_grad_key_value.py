"""Triton kernel of the attention backward pass: gradients of key and value."""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_tiles import (
    base2,
    dropped,
    grad_scores,
    is_one_part,
    key_rows_ok,
    load_rows,
    may_hide,
    product,
    product_add,
    query_block,
    round_to,
    scores,
    sequence,
    store_rows,
    wide,
)


@triton.jit
def _grad_key_value_tiles(
    b_dk,
    b_dv,
    b_k,
    b_v,
    p_q,
    p_do,
    p_lse,
    p_delta,
    stride_q,
    stride_do,
    masks,
    scaling,
    b_ok,
    b,
    head,
    head_index,
    start_n,
    first_row,
    first,
    last,
    queries,
    keys,
    CAUSAL: tl.constexpr,
    MASKED: tl.constexpr,
    WANTS_KEY: tl.constexpr,
    WANTS_VALUE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Adds the query tiles from `first` to `last` of one head to the gradients of the (scaled) key and of value."""
    b_i = tl.arange(0, BLOCK_M)
    for tile in tl.range(first, last):
        start_m = tile * BLOCK_M
        b_m = start_m + b_i
        b_in = b_m < queries
        block, _full_lo, _full_hi = query_block(masks, b, head, first_row, queries, keys, b_m, CAUSAL)
        wanted = True
        if masks.range_start is not None:
            wanted = (block.lo < start_n + BLOCK_N) & (block.hi > start_n)
        if wanted:
            b_lse = tl.load(p_lse + b_m, mask=b_in, other=-float("inf"))
            b_delta = tl.load(p_delta + b_m, mask=b_in, other=0.0)
            # Empty rows are not read: their query and grad_out may be NaN.
            b_live = b_lse != -float("inf")
            b_q = load_rows(p_q + wide(start_m) * stride_q, b_i, stride_q, b_live, HEAD_DIM, BLOCK_D, True, WIDE)
            b_do = load_rows(p_do + wide(start_m) * stride_do, b_i, stride_do, b_live, VALUE_DIM, BLOCK_DV, True, WIDE)
            # [BN, BM]
            b_qk = product(b_k, tl.trans(b_q), PRECISION)
            b_s, b_tanh = scores(masks, scaling, block, b_qk, b_ok, start_n, MASKED, True, BLOCK_N)
            b_p = tl.exp2(b_s - base2(b_lse)[None, :])
            b_p = dropped(b_p, masks.dropout, head_index, b_m, start_n, BLOCK_N, True)
            if WANTS_VALUE:
                b_weight = b_p
                if masks.dropout is not None:
                    b_weight = tl.where(b_p > 0.0, b_p * masks.dropout.keep_scale, 0.0)
                b_dv = product_add(round_to(b_weight, p_do.dtype.element_ty), b_do, b_dv, PRECISION)
            if WANTS_KEY:
                b_dp = product(b_v, tl.trans(b_do), PRECISION)
                _b_ds, b_dqk = grad_scores(b_p, b_dp, b_delta[None, :], b_tanh, masks.dropout, may_hide(masks))
                b_dk = product_add(round_to(b_dqk, p_q.dtype.element_ty), b_q, b_dk, PRECISION)
    return b_dk, b_dv


@triton.jit
def grad_key_value_kernel(
    query,
    key,
    value,
    grad_out,
    logsumexp,
    delta,
    grad_key,
    grad_value,
    query_strides,
    key_strides,
    value_strides,
    grad_out_strides,
    grad_key_strides,
    grad_value_strides,
    logsumexp_strides,
    masks,
    scaling,
    sizes,
    scale,
    key_blocks,
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
    """One block of keys of one key head: the query heads of its group one behind the other."""
    WANTS_KEY: tl.constexpr = grad_key is not None
    WANTS_VALUE: tl.constexpr = grad_value is not None
    kv_heads = sizes.heads // sizes.group
    key_block = tl.program_id(0) % key_blocks
    kv_head = (tl.program_id(0) // key_blocks) % kv_heads
    b = tl.program_id(0) // key_blocks // kv_heads
    start_q, queries = sequence(sizes.cu_seqlens_q, b, sizes.queries)
    start_k, keys = sequence(sizes.cu_seqlens_k, b, sizes.keys)
    if sizes.cu_seqlens_q is None:
        first_row = b * queries
    else:
        first_row = start_q
    start_n = key_block * BLOCK_N
    if start_n >= keys:
        return
    b_j = tl.arange(0, BLOCK_N)
    first_k = wide(start_k + start_n)

    # Keys past the length are not read; what key_mask hides is not either.
    length = keys
    if masks.lengths is not None:
        length = tl.minimum(keys, tl.maximum(tl.load(masks.lengths + b), 0))
    b_ok = key_rows_ok(masks, b, start_n, 0, length, BLOCK_N, True)
    p_k = key + wide(b) * key_strides.batch + wide(kv_head) * key_strides.head + first_k * key_strides.row
    p_v = value + wide(b) * value_strides.batch + wide(kv_head) * value_strides.head + first_k * value_strides.row
    b_k = load_rows(p_k, b_j, key_strides.row, b_ok, HEAD_DIM, BLOCK_D, True, WIDE)
    b_v = load_rows(p_v, b_j, value_strides.row, b_ok, VALUE_DIM, BLOCK_DV, True, WIDE)
    b_dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    b_dv = tl.zeros((BLOCK_N, BLOCK_DV), tl.float32)

    # Query tiles [first, full) need masks, [full, last) see all of these keys.
    HAS_FULL: tl.constexpr = (not is_one_part(masks, False)) and (masks.range_start is None)
    first = 0
    if CAUSAL:
        first = start_n // BLOCK_M
    last = tl.where(start_n < length, tl.cdiv(queries, BLOCK_M), first)
    full = last
    if HAS_FULL:
        if CAUSAL:
            full = tl.minimum(tl.cdiv(start_n + BLOCK_N - 1, BLOCK_M), last)
        else:
            full = first
        full = tl.where(start_n + BLOCK_N <= length, full, last)
    bounds = (first, full, last)
    for member in tl.range(0, sizes.group):
        head = kv_head * sizes.group + member
        p_q = query + wide(b) * query_strides.batch + wide(head) * query_strides.head
        p_q += wide(start_q) * query_strides.row
        p_do = (
            grad_out
            + wide(b) * grad_out_strides.batch
            + wide(head) * grad_out_strides.head
            + wide(start_q) * grad_out_strides.row
        )
        lse_at = wide(b) * logsumexp_strides.batch + wide(head) * logsumexp_strides.head + start_q
        for part in tl.static_range(1 + HAS_FULL):
            b_dk, b_dv = _grad_key_value_tiles(
                b_dk,
                b_dv,
                b_k,
                b_v,
                p_q,
                p_do,
                logsumexp + lse_at,
                delta + lse_at,
                query_strides.row,
                grad_out_strides.row,
                masks,
                scaling,
                b_ok,
                b,
                head,
                b * sizes.heads + head,
                start_n,
                first_row,
                bounds[part],
                bounds[part + 1],
                queries,
                keys,
                CAUSAL,
                part == 0,
                WANTS_KEY,
                WANTS_VALUE,
                HEAD_DIM,
                VALUE_DIM,
                BLOCK_M,
                BLOCK_N,
                BLOCK_D,
                BLOCK_DV,
                WIDE,
                PRECISION,
            )
    b_in = start_n + b_j < keys
    if WANTS_KEY:
        p_dk = (
            grad_key
            + wide(b) * grad_key_strides.batch
            + wide(kv_head) * grad_key_strides.head
            + first_k * grad_key_strides.row
        )
        store_rows(p_dk, b_j, grad_key_strides.row, b_in, b_dk * scale, HEAD_DIM, BLOCK_D, WIDE)
    if WANTS_VALUE:
        p_dv = (
            grad_value
            + wide(b) * grad_value_strides.batch
            + wide(kv_head) * grad_value_strides.head
            + first_k * grad_value_strides.row
        )
        store_rows(p_dv, b_j, grad_value_strides.row, b_in, b_dv, VALUE_DIM, BLOCK_DV, WIDE)
