"""Triton kernels of the attention forward pass: outputs with their logsumexp, and the attention each key received."""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_tiles import (
    LN2,
    block_bounds,
    kept,
    key_rows_ok,
    load_rows,
    product,
    product_add,
    round_to,
    row_bounds,
    scores,
    sequence,
    wide,
)


@triton.jit
def _attend(
    b_acc,
    b_max,
    b_sum,
    b_q,
    p_k,
    p_v,
    stride_k,
    stride_v,
    masks,
    scaling,
    b,
    b_head,
    b_dropout_head,
    b_m,
    b_lo,
    b_hi,
    lo,
    hi,
    start,
    stop,
    queries,
    keys,
    MASKED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Online softmax over the key tiles from `start` to `stop`."""
    HIDES: tl.constexpr = (masks.mask is not None) or (masks.bias is not None)
    HIDES_COLUMNS: tl.constexpr = HIDES or (MASKED and masks.range_start is not None)
    CHECKED: tl.constexpr = MASKED or HIDES or (masks.key_mask is not None)
    b_j = tl.arange(0, BLOCK_N)
    for start_n in tl.range(start, stop, BLOCK_N):
        b_n = start_n + b_j
        b_ok = key_rows_ok(masks, b, b_n, lo, hi, keys, MASKED)
        READS_SOME: tl.constexpr = MASKED or (masks.key_mask is not None)
        b_k = load_rows(p_k + wide(start_n) * stride_k, b_j, stride_k, b_ok, HEAD_DIM, BLOCK_D, READS_SOME, WIDE)
        b_s, b_visible, _b_tanh = scores(
            masks,
            scaling,
            product(b_q, tl.trans(b_k), PRECISION),
            b_ok,
            b,
            b_head,
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
        # [BM]
        b_new_max = tl.maximum(b_max, tl.max(b_s, 1))
        if CHECKED:
            # A row that has seen nothing yet: exp2(-inf - 0) = 0 instead of exp2(-inf + inf).
            b_shift = tl.where(b_new_max == -float("inf"), 0.0, b_new_max)
        else:
            b_shift = b_new_max
        # [BM, BN]
        b_p = tl.exp2(b_s - b_shift[:, None])
        b_decay = tl.exp2(b_max - b_shift)
        b_sum = b_sum * b_decay + tl.sum(b_p, 1)
        b_max = b_new_max
        if masks.seed is not None:
            b_keep = kept(
                masks.seed, masks.drop_below, masks.direction, b_dropout_head, b_m[:, None], start_n, BLOCK_N, False
            )
            b_p = tl.where(b_keep, b_p, 0.0)
        b_v = load_rows(p_v + wide(start_n) * stride_v, b_j, stride_v, b_ok, VALUE_DIM, BLOCK_DV, READS_SOME, WIDE)
        if HIDES_COLUMNS:
            # A value that no row of this block sees may be NaN, which 0 would not silence.
            b_seen = tl.max(b_visible.to(tl.int32), 0) > 0
            b_v = tl.where(b_seen[:, None], b_v, tl.zeros_like(b_v))
        b_acc = product_add(round_to(b_p, p_v.dtype.element_ty), b_v, b_acc * b_decay[:, None], PRECISION)
    return b_acc, b_max, b_sum


@triton.jit
def attention_forward_kernel(
    query,
    key,
    value,
    out,
    logsumexp,
    query_strides,
    key_strides,
    value_strides,
    out_strides,
    logsumexp_strides,
    masks,
    scaling,
    sizes,
    query_blocks,
    splits,
    split_keys,
    CAUSAL: tl.constexpr,
    PACKED: tl.constexpr,
    SPLIT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One block of query rows against all of its keys.

    PACKED: the rows are (query head of the group, query), so that the heads that share a key head read it once.
    SPLIT: the program handles `split_keys` keys only; `out` (splits, rows of logsumexp, VALUE_DIM) and `logsumexp`
    (splits, ...) are float32 partial results for `merge_splits_kernel`.
    """
    block = tl.program_id(0) % query_blocks
    rest = tl.program_id(0) // query_blocks
    if SPLIT:
        split = rest % splits
        rest = rest // splits
    else:
        split = 0
    if CAUSAL:
        # The longest rows first: the last programs to run are then short.
        block = query_blocks - 1 - block
    if PACKED:
        b = rest // (sizes.heads // sizes.group)
        kv_head = rest % (sizes.heads // sizes.group)
    else:
        b = rest // sizes.heads
        kv_head = (rest % sizes.heads) // sizes.group
    start_q, queries = sequence(sizes.cu_seqlens_q, b, sizes.queries)
    start_k, keys = sequence(sizes.cu_seqlens_k, b, sizes.keys)
    if sizes.cu_seqlens_q is None:
        first_row = b * queries
    else:
        first_row = start_q

    b_i = tl.arange(0, BLOCK_M)
    b_row = block * BLOCK_M + b_i
    if PACKED:
        b_head = kv_head * sizes.group + b_row // queries
        b_in = b_row < queries * sizes.group
        # Rows past the end get a query past the end, and no head that does not exist.
        b_head = tl.where(b_in, b_head, 0)
        b_m = tl.where(b_in, b_row % queries, queries)
        b_head2 = b_head[:, None]
    else:
        if block * BLOCK_M >= queries:
            return
        b_head = rest % sizes.heads
        b_m = b_row
        b_in = b_row < queries
        b_head2 = b_head

    # [BM]
    b_lo, b_hi = row_bounds(masks, b, first_row, queries, keys, b_m, CAUSAL)
    lo, hi, full_lo, full_hi = block_bounds(b_lo, b_hi, b_in)
    if SPLIT:
        # split_keys is a multiple of BLOCK_N.
        lo = tl.maximum(lo, split * split_keys)
        hi = tl.minimum(hi, (split + 1) * split_keys)
    start = (lo // BLOCK_N) * BLOCK_N
    stop = tl.maximum(hi, start)
    full_start = tl.minimum(tl.maximum(tl.cdiv(full_lo, BLOCK_N) * BLOCK_N, start), stop)
    full_stop = tl.maximum((tl.minimum(full_hi, hi) // BLOCK_N) * BLOCK_N, full_start)

    p_q = query + wide(b) * query_strides.batch + wide(start_q) * query_strides.row
    b_d = tl.arange(0, BLOCK_D)
    p_q_rows = p_q + wide(b_head) * query_strides.head + wide(b_m) * query_strides.row
    b_q_ok = b_in[:, None]
    if HEAD_DIM != BLOCK_D:
        b_q_ok = b_q_ok & (b_d < HEAD_DIM)[None, :]
    # [BM, D]
    b_q = tl.load(p_q_rows[:, None] + b_d[None, :], mask=b_q_ok, other=0.0)
    p_k = key + wide(b) * key_strides.batch + wide(kv_head) * key_strides.head + wide(start_k) * key_strides.row
    p_v = value + wide(b) * value_strides.batch + wide(kv_head) * value_strides.head + wide(start_k) * value_strides.row

    b_acc = tl.zeros((BLOCK_M, BLOCK_DV), tl.float32)
    b_max = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    b_sum = tl.zeros((BLOCK_M,), tl.float32)
    b_dropout_head = b * sizes.heads + b_head2
    if masks.range_start is not None:
        b_acc, b_max, b_sum = _attend(
            b_acc,
            b_max,
            b_sum,
            b_q,
            p_k,
            p_v,
            key_strides.row,
            value_strides.row,
            masks,
            scaling,
            b,
            b_head2,
            b_dropout_head,
            b_m,
            b_lo,
            b_hi,
            lo,
            hi,
            start,
            full_start,
            queries,
            keys,
            True,
            HEAD_DIM,
            VALUE_DIM,
            BLOCK_N,
            BLOCK_D,
            BLOCK_DV,
            WIDE,
            PRECISION,
        )
    b_acc, b_max, b_sum = _attend(
        b_acc,
        b_max,
        b_sum,
        b_q,
        p_k,
        p_v,
        key_strides.row,
        value_strides.row,
        masks,
        scaling,
        b,
        b_head2,
        b_dropout_head,
        b_m,
        b_lo,
        b_hi,
        lo,
        hi,
        full_start,
        full_stop,
        queries,
        keys,
        False,
        HEAD_DIM,
        VALUE_DIM,
        BLOCK_N,
        BLOCK_D,
        BLOCK_DV,
        WIDE,
        PRECISION,
    )
    b_acc, b_max, b_sum = _attend(
        b_acc,
        b_max,
        b_sum,
        b_q,
        p_k,
        p_v,
        key_strides.row,
        value_strides.row,
        masks,
        scaling,
        b,
        b_head2,
        b_dropout_head,
        b_m,
        b_lo,
        b_hi,
        lo,
        hi,
        full_stop,
        stop,
        queries,
        keys,
        True,
        HEAD_DIM,
        VALUE_DIM,
        BLOCK_N,
        BLOCK_D,
        BLOCK_DV,
        WIDE,
        PRECISION,
    )

    # NaN and inf sums are results; only a sum of exactly nothing is an empty row.
    b_empty = b_sum == 0.0
    b_scale = 1.0 / tl.where(b_empty, 1.0, b_sum)
    if masks.seed is not None:
        b_scale = b_scale * masks.keep_scale
    b_out = b_acc * b_scale[:, None]
    b_lse = tl.where(b_empty, -float("inf"), (b_max + tl.log2(tl.where(b_empty, 1.0, b_sum))) * LN2)

    b_lse_at = wide(b) * logsumexp_strides.batch + wide(b_head) * logsumexp_strides.head + start_q + b_m
    if SPLIT:
        # `logsumexp_strides.row` is the number of rows of one partial result.
        b_lse_at = b_lse_at + wide(split) * logsumexp_strides.row
        p_out_rows = out + b_lse_at * VALUE_DIM
    else:
        p_out_rows = (
            out + wide(b) * out_strides.batch + wide(b_head) * out_strides.head + wide(start_q + b_m) * out_strides.row
        )
    tl.store(logsumexp + b_lse_at, b_lse, mask=b_in)
    b_dv = tl.arange(0, BLOCK_DV)
    b_out_ok = b_in[:, None]
    if VALUE_DIM != BLOCK_DV:
        b_out_ok = b_out_ok & (b_dv < VALUE_DIM)[None, :]
    tl.store(p_out_rows[:, None] + b_dv[None, :], round_to(b_out, out.dtype.element_ty), mask=b_out_ok)


@triton.jit
def merge_splits_kernel(
    partial_out,
    partial_logsumexp,
    out,
    logsumexp,
    out_strides,
    heads,
    queries,
    rows,
    splits,
    VALUE_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """Merge partial results over keys, in the order of the keys, whatever order they were computed in."""
    b_row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    b_in = b_row < rows
    b_dv = tl.arange(0, BLOCK_DV)
    b_ok = b_in[:, None] & (b_dv < VALUE_DIM)[None, :]
    b_max = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    b_sum = tl.zeros((BLOCK_M,), tl.float32)
    b_acc = tl.zeros((BLOCK_M, BLOCK_DV), tl.float32)
    for split in tl.range(0, splits):
        b_at = wide(split) * rows + b_row
        b_lse = tl.load(partial_logsumexp + b_at, mask=b_in, other=-float("inf"))
        b_out = tl.load(partial_out + (b_at * VALUE_DIM)[:, None] + b_dv[None, :], mask=b_ok, other=0.0)
        b_new_max = tl.maximum(b_max, b_lse)
        b_shift = tl.where(b_new_max == -float("inf"), 0.0, b_new_max)
        b_decay = tl.exp(b_max - b_shift)
        b_weight = tl.exp(b_lse - b_shift)
        b_acc = b_acc * b_decay[:, None] + b_out * b_weight[:, None]
        b_sum = b_sum * b_decay + b_weight
        b_max = b_new_max
    b_empty = b_sum == 0.0
    b_safe = tl.where(b_empty, 1.0, b_sum)
    tl.store(logsumexp + b_row, tl.where(b_empty, -float("inf"), b_max + tl.log(b_safe)), mask=b_in)
    b = b_row // (heads * queries)
    b_head = (b_row // queries) % heads
    b_m = b_row % queries
    p_rows = out + wide(b) * out_strides.batch + wide(b_head) * out_strides.head + wide(b_m) * out_strides.row
    tl.store(p_rows[:, None] + b_dv[None, :], round_to(b_acc / b_safe[:, None], out.dtype.element_ty), mask=b_ok)


@triton.jit
def key_mass_kernel(
    query,
    key,
    logsumexp,
    key_mass,
    query_strides,
    key_strides,
    logsumexp_strides,
    mass_strides,
    masks,
    scaling,
    sizes,
    key_blocks,
    CAUSAL: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Column sums of the probabilities, one block of keys of one query head a program."""
    block = tl.program_id(0) % key_blocks
    head = (tl.program_id(0) // key_blocks) % sizes.heads
    b = tl.program_id(0) // key_blocks // sizes.heads
    start_q, queries = sequence(sizes.cu_seqlens_q, b, sizes.queries)
    start_k, keys = sequence(sizes.cu_seqlens_k, b, sizes.keys)
    if sizes.cu_seqlens_q is None:
        first_row = b * queries
    else:
        first_row = start_q
    start_n = block * BLOCK_N
    if start_n >= keys:
        return
    b_j = tl.arange(0, BLOCK_N)
    b_n = start_n + b_j
    p_k = (
        key
        + wide(b) * key_strides.batch
        + wide(head // sizes.group) * key_strides.head
        + wide(start_k + start_n) * key_strides.row
    )
    p_q = query + wide(b) * query_strides.batch + wide(head) * query_strides.head + wide(start_q) * query_strides.row
    p_lse = logsumexp + wide(b) * logsumexp_strides.batch + wide(head) * logsumexp_strides.head + start_q
    b_ok = key_rows_ok(masks, b, b_n, 0, keys, keys, True)
    b_k = load_rows(p_k, b_j, key_strides.row, b_ok, HEAD_DIM, BLOCK_D, True, WIDE)
    b_mass = tl.zeros((BLOCK_N,), tl.float32)
    b_i = tl.arange(0, BLOCK_M)
    start = 0
    if CAUSAL:
        start = (start_n // BLOCK_M) * BLOCK_M
    for start_m in tl.range(start, queries, BLOCK_M):
        b_m = start_m + b_i
        b_lo, b_hi = row_bounds(masks, b, first_row, queries, keys, b_m, CAUSAL)
        wanted = True
        if masks.range_start is not None:
            lo, hi, _full_lo, _full_hi = block_bounds(b_lo, b_hi, b_m < queries)
            wanted = (lo < start_n + BLOCK_N) & (hi > start_n)
        if wanted:
            b_lse = tl.load(p_lse + b_m, mask=b_m < queries, other=-float("inf"))
            b_q = load_rows(
                p_q + wide(start_m) * query_strides.row,
                b_i,
                query_strides.row,
                b_m < queries,
                HEAD_DIM,
                BLOCK_D,
                True,
                WIDE,
            )
            # [BN, BM]
            b_s, _b_visible, _b_tanh = scores(
                masks,
                scaling,
                product(b_k, tl.trans(b_q), PRECISION),
                b_ok,
                b,
                head,
                b_m[None, :],
                b_n[:, None],
                b_lo[None, :],
                b_hi[None, :],
                keys,
                queries,
                True,
                True,
                WIDE,
            )
            # An empty row: exp2(-inf - inf) = 0.
            b_lse2 = tl.where(b_lse == -float("inf"), float("inf"), b_lse / LN2)
            b_mass += tl.sum(tl.exp2(b_s - b_lse2[None, :]), 1)
    p_mass = key_mass + wide(b) * mass_strides.batch + wide(head) * mass_strides.head + start_k
    tl.store(p_mass + b_n, b_mass, mask=b_n < keys)
