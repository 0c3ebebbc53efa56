"""Triton kernels of the attention forward pass: outputs with their logsumexp, and the attention each key received."""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_tiles import (
    LN2,
    base2,
    has_part,
    is_settled,
    kept,
    key_rows_ok,
    key_tiles,
    load_rows,
    product,
    product_add,
    query_block,
    report_nan,
    round_to,
    scores,
    seen_keys,
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
    block,
    b_head_index,
    first,
    last,
    MASKED: tl.constexpr,
    GUARDED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Online softmax over the key tiles from `first` to `last`. GUARDED: values that no row of the tile sees are not
    read."""
    READS_SOME: tl.constexpr = MASKED or (masks.key_mask is not None)
    b_j = tl.arange(0, BLOCK_N)
    for tile in tl.range(first, last):
        start_n = tile * BLOCK_N
        b_ok = key_rows_ok(masks, block.b, start_n, block.lo, block.hi, BLOCK_N, MASKED)
        b_k = load_rows(p_k + wide(start_n) * stride_k, b_j, stride_k, b_ok, HEAD_DIM, BLOCK_D, READS_SOME, WIDE)
        # [BM, BN]
        b_qk = product(b_q, tl.trans(b_k), PRECISION)
        b_s, _b_tanh = scores(masks, scaling, block, b_qk, b_ok, start_n, MASKED, False, BLOCK_N)
        # [BM]
        b_new_max = tl.maximum(b_max, tl.max(b_s, 1))
        if READS_SOME:
            # A row that has seen nothing yet: exp2(-inf - 0) = 0 instead of exp2(-inf + inf).
            b_shift = tl.where(b_new_max == -float("inf"), 0.0, b_new_max)
        else:
            b_shift = b_new_max
        # [BM, BN]
        b_p = tl.exp2(b_s - b_shift[:, None])
        b_decay = tl.exp2(b_max - b_shift)
        b_sum = b_sum * b_decay + tl.sum(b_p, 1)
        b_max = b_new_max
        if masks.dropout is not None:
            b_p = tl.where(kept(masks.dropout, b_head_index, block.b_m, start_n, BLOCK_N, False), b_p, 0.0)
        if GUARDED:
            b_ok = seen_keys(b_s)
        b_v = load_rows(p_v + wide(start_n) * stride_v, b_j, stride_v, b_ok, VALUE_DIM, BLOCK_DV, READS_SOME, WIDE)
        b_acc = product_add(round_to(b_p, p_v.dtype.element_ty), b_v, b_acc * b_decay[:, None], PRECISION)
    return b_acc, b_max, b_sum


@triton.jit
def attention_forward_kernel(
    query,
    key,
    value,
    out,
    logsumexp,
    flags,
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
    GUARDED: tl.constexpr,
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
    (splits, ...) are float32 partial results for `merge_splits_kernel`. `flags` and GUARDED: see `report_nan`.
    """
    if is_settled(flags, GUARDED):
        return
    row_block = tl.program_id(0) % query_blocks
    rest = tl.program_id(0) // query_blocks
    if SPLIT:
        split = rest % splits
        rest = rest // splits
    else:
        split = 0
    if CAUSAL:
        # The longest rows first: the last programs to run are then short.
        row_block = query_blocks - 1 - row_block
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
    b_row = row_block * BLOCK_M + b_i
    if PACKED:
        b_head = kv_head * sizes.group + b_row // queries
        b_in = b_row < queries * sizes.group
        # Rows past the end get a query past the end, and no head that does not exist.
        b_head = tl.where(b_in, b_head, 0)
        b_m = tl.where(b_in, b_row % queries, queries)
    else:
        if row_block * BLOCK_M >= queries:
            return
        b_head = rest % sizes.heads
        b_m = b_row
        b_in = b_row < queries

    block, full_lo, full_hi = query_block(masks, b, b_head, first_row, queries, keys, b_m, CAUSAL)
    lo = block.lo
    hi = block.hi
    if SPLIT:
        # split_keys is a multiple of BLOCK_N.
        lo = tl.maximum(lo, split * split_keys)
        hi = tl.minimum(hi, (split + 1) * split_keys)
    bounds = key_tiles(masks, lo, hi, full_lo, full_hi, BLOCK_N, GUARDED)

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
    for part in tl.static_range(3):
        if has_part(masks, part, GUARDED):
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
                block,
                b * sizes.heads + b_head,
                bounds[part],
                bounds[part + 1],
                part != 1,
                GUARDED,
                HEAD_DIM,
                VALUE_DIM,
                BLOCK_N,
                BLOCK_D,
                BLOCK_DV,
                WIDE,
                PRECISION,
            )
    if flags is not None and not GUARDED:
        report_nan(flags, b_acc)

    # NaN and inf sums are results; only a sum of exactly nothing is an empty row.
    b_empty = b_sum == 0.0
    b_scale = 1.0 / tl.where(b_empty, 1.0, b_sum)
    if masks.dropout is not None:
        b_scale = b_scale * masks.dropout.keep_scale
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
    key_block = tl.program_id(0) % key_blocks
    head = (tl.program_id(0) // key_blocks) % sizes.heads
    b = tl.program_id(0) // key_blocks // sizes.heads
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
    p_k = (
        key
        + wide(b) * key_strides.batch
        + wide(head // sizes.group) * key_strides.head
        + wide(start_k + start_n) * key_strides.row
    )
    p_q = query + wide(b) * query_strides.batch + wide(head) * query_strides.head + wide(start_q) * query_strides.row
    p_lse = logsumexp + wide(b) * logsumexp_strides.batch + wide(head) * logsumexp_strides.head + start_q
    b_ok = key_rows_ok(masks, b, start_n, 0, keys, BLOCK_N, True)
    b_k = load_rows(p_k, b_j, key_strides.row, b_ok, HEAD_DIM, BLOCK_D, True, WIDE)
    b_mass = tl.zeros((BLOCK_N,), tl.float32)
    b_i = tl.arange(0, BLOCK_M)
    first = 0
    if CAUSAL:
        first = start_n // BLOCK_M
    for tile in tl.range(first, tl.cdiv(queries, BLOCK_M)):
        start_m = tile * BLOCK_M
        b_m = start_m + b_i
        b_in = b_m < queries
        block, _full_lo, _full_hi = query_block(masks, b, head, first_row, queries, keys, b_m, CAUSAL)
        wanted = True
        if masks.range_start is not None:
            wanted = (block.lo < start_n + BLOCK_N) & (block.hi > start_n)
        if wanted:
            b_lse = tl.load(p_lse + b_m, mask=b_in, other=-float("inf"))
            p_rows = p_q + wide(start_m) * query_strides.row
            b_q = load_rows(p_rows, b_i, query_strides.row, b_in, HEAD_DIM, BLOCK_D, True, WIDE)
            # [BN, BM]
            b_qk = product(b_k, tl.trans(b_q), PRECISION)
            b_s, _b_tanh = scores(masks, scaling, block, b_qk, b_ok, start_n, True, True, BLOCK_N)
            b_mass += tl.sum(tl.exp2(b_s - base2(b_lse)[None, :]), 1)
    p_mass = key_mass + wide(b) * mass_strides.batch + wide(head) * mass_strides.head + start_k + start_n
    tl.store(p_mass + b_j, b_mass, mask=start_n + b_j < keys)
