"""Triton kernel of the attention backward pass: gradients of key and value."""

from __future__ import annotations

import triton
import triton.language as tl

from velm_kernels.attention.triton_kernels.products import (
    add_seen,
    add_weighted,
    has_nan,
    of_seen,
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
    kept_weights,
    key_rows_ok,
    probabilities,
    query_block,
    scores,
    unless_infinite,
)
from velm_kernels.triton.kernels import round_to, to_int64


@triton.jit
def _grad_key_value_tiles(
    dk,
    dv,
    k,
    v,
    p_q,
    p_do,
    p_lse,
    p_shift,
    p_delta,
    stride_q,
    stride_do,
    masks,
    dropout,
    scaling,
    b_ok,
    b,
    head,
    head_index,
    start_n,
    e,
    part,
    first,
    last,
    CAUSAL: tl.constexpr,
    SHIFTS: tl.constexpr,
    MASKED: tl.constexpr,
    GUARDED: tl.constexpr,
    WANTS_KEY: tl.constexpr,
    WANTS_VALUE: tl.constexpr,
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
    """Adds the query tiles from `first` to `last` of one head to the gradients of the (scaled) key and of value.
    GUARDED: see `add_seen`."""
    HIDES: tl.constexpr = MASKED or (masks.key_mask is not None)
    b_i = tl.arange(0, BLOCK_M)
    for tile in tl.range(first, last):
        start_m = tile * BLOCK_M
        b_m = start_m + b_i
        b_in = b_m < e.queries
        block, _full_lo, _full_hi = query_block(masks, b, head, e.first_row, e.queries, e.keys, b_m, CAUSAL)
        wanted = True
        if masks.range_start is not None:
            wanted = (block.lo < start_n + BLOCK_N) & (block.hi > start_n)
        if wanted:
            b_lse = tl.load(p_lse + b_m, mask=b_in, other=PAST_END)
            b_delta = tl.load(p_delta + b_m, mask=b_in, other=0.0)
            # Empty rows are not read: their query and grad_out may be NaN.
            b_live = b_in & (b_lse != -float("inf"))
            q = rows(p_q + to_int64(start_m) * stride_q, b_i, stride_q, b_live, HEAD_DIM, BLOCK_D, INT64)
            do = rows(p_do + to_int64(start_m) * stride_do, b_i, stride_do, b_live, VALUE_DIM, BLOCK_DV, INT64)
            # [BN, BM]
            b_qk = product_of_rows(k, q, HEAD_DIM, BLOCK_D, PRECISION)
            b_s = scores(masks, scaling, block, b_qk, b_ok, start_n, MASKED, True, False, BLOCK_N)
            b_shift = b_lse[None, :]
            if SHIFTS:
                b_shift = tl.load(p_shift + b_m, mask=b_in, other=0.0)[None, :]
            b_lse = unless_infinite(b_lse)[None, :]
            b_p = probabilities(b_s, b_lse, b_shift, dropout, head_index, b_m, start_n, SHIFTS, HIDES, BLOCK_N, True)
            if WANTS_VALUE:
                b_weight = round_to(kept_weights(b_p, dropout), p_do.dtype.element_ty)
                if GUARDED:
                    b_seen = b_s != LOWEST
                    dv = add_seen(dv, None, b_weight, b_seen, do, part, VALUE_DIM, BLOCK_DV, PARTS, PRECISION)
                else:
                    dv = add_weighted(dv, None, b_weight, do, part, VALUE_DIM, BLOCK_DV, PARTS, PRECISION)
            if WANTS_KEY:
                b_dp = product_of_rows(v, do, VALUE_DIM, BLOCK_DV, PRECISION)
                b_ds = grad_scores(b_p, b_dp, b_delta[None, :], dropout, HIDES)
                b_dqk = round_to(grad_products(b_ds, b_p, b_qk, scaling, HIDES), p_q.dtype.element_ty)
                if GUARDED:
                    dk = add_seen(dk, None, b_dqk, b_s != LOWEST, q, part, HEAD_DIM, BLOCK_D, PARTS, PRECISION)
                else:
                    dk = add_weighted(dk, None, b_dqk, q, part, HEAD_DIM, BLOCK_D, PARTS, PRECISION)
    return dk, dv


@triton.jit
def grad_key_value_kernel(
    query,
    key,
    value,
    grad_out,
    logsumexp,
    shift,
    delta,
    grad_key,
    grad_value,
    flags,
    query_strides,
    key_strides,
    value_strides,
    grad_out_strides,
    grad_key_strides,
    grad_value_strides,
    logsumexp_strides,
    masks,
    dropout,
    scaling,
    sizes,
    scale,
    key_blocks,
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
    """One block of keys of one key head: the query heads of its group one behind the other. PARTS programs share the
    columns of the gradients. `flags` and GUARDED: see `report_nan`; FIRST_PHASE: see `key_tiles`."""
    if GUARDED:  # noqa: SIM102
        if not has_nan(flags, BLOCK_N):
            return
    SHIFTS: tl.constexpr = shift is not None
    WANTS_KEY: tl.constexpr = grad_key is not None
    WANTS_VALUE: tl.constexpr = grad_value is not None
    kv_heads = sizes.heads // sizes.group
    part = tl.program_id(0) % PARTS
    rest = tl.program_id(0) // PARTS
    key_block = rest % key_blocks
    kv_head = (rest // key_blocks) % kv_heads
    b = rest // key_blocks // kv_heads
    e = extents(sizes, b)
    start_n = key_block * BLOCK_N
    if start_n >= e.keys:
        return
    b_j = tl.arange(0, BLOCK_N)
    first_k = e.start_k + start_n

    # Keys past the length are not read; what key_mask hides is not either.
    length = e.keys
    if masks.lengths is not None:
        length = tl.minimum(e.keys, tl.maximum(tl.load(masks.lengths + b), 0))
    b_ok = key_rows_ok(masks, b, start_n, 0, length, BLOCK_N, True)
    p_k = row_of(key, key_strides, b, kv_head, first_k)
    p_v = row_of(value, value_strides, b, kv_head, first_k)
    k = rows(p_k, b_j, key_strides.row, b_ok, HEAD_DIM, BLOCK_D, INT64)
    v = rows(p_v, b_j, value_strides.row, b_ok, VALUE_DIM, BLOCK_DV, INT64)
    dk = zero_pieces(BLOCK_N, HEAD_DIM, BLOCK_D, PARTS)
    dv = zero_pieces(BLOCK_N, VALUE_DIM, BLOCK_DV, PARTS)

    # Query tiles [first, full) need masks, [full, last) see all of these keys.
    HAS_FULL: tl.constexpr = FIRST_PHASE == 1
    first = 0
    if CAUSAL:
        first = start_n // BLOCK_M
    last = tl.where(start_n < length, tl.cdiv(e.queries, BLOCK_M), first)
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
        p_q = row_of(query, query_strides, b, head, e.start_q)
        p_do = row_of(grad_out, grad_out_strides, b, head, e.start_q)
        lse_at = to_int64(b) * logsumexp_strides.batch + to_int64(head) * logsumexp_strides.head + e.start_q
        p_shift = logsumexp + lse_at
        if SHIFTS:
            p_shift = shift + lse_at
        for phase in tl.static_range(1 + HAS_FULL):
            dk, dv = _grad_key_value_tiles(
                dk,
                dv,
                k,
                v,
                p_q,
                p_do,
                logsumexp + lse_at,
                p_shift,
                delta + lse_at,
                query_strides.row,
                grad_out_strides.row,
                masks,
                dropout,
                scaling,
                b_ok,
                b,
                head,
                b * sizes.heads + head,
                start_n,
                e,
                part,
                bounds[phase],
                bounds[phase + 1],
                CAUSAL,
                SHIFTS,
                phase == 0,
                GUARDED,
                WANTS_KEY,
                WANTS_VALUE,
                HEAD_DIM,
                VALUE_DIM,
                BLOCK_M,
                BLOCK_N,
                BLOCK_D,
                BLOCK_DV,
                PARTS,
                INT64,
                PRECISION,
            )
    if (masks.lengths is not None) or (masks.key_mask is not None):
        dk, dv = of_seen(dk, b_ok), of_seen(dv, b_ok)
    if (flags is not None) and not GUARDED:
        if WANTS_KEY and WANTS_VALUE:
            report_nan(flags, dk + dv, BLOCK_N)
        elif WANTS_KEY:
            report_nan(flags, dk, BLOCK_N)
        else:
            report_nan(flags, dv, BLOCK_N)
    b_in = start_n + b_j < e.keys
    if WANTS_KEY:
        p_dk = row_of(grad_key, grad_key_strides, b, kv_head, first_k)
        store_rows(p_dk, b_j, grad_key_strides.row, b_in, dk, scale, part, GUARDED, HEAD_DIM, BLOCK_D, PARTS, INT64)
    if WANTS_VALUE:
        p_dv = row_of(grad_value, grad_value_strides, b, kv_head, first_k)
        store_rows(p_dv, b_j, grad_value_strides.row, b_in, dv, 1.0, part, GUARDED, VALUE_DIM, BLOCK_DV, PARTS, INT64)
