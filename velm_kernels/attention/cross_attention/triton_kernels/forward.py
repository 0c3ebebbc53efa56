"""Triton kernels of the attention forward pass: outputs with their logsumexp, and the attention each key received."""

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
    rows_at,
    store_pieces,
    zero_pieces,
)
from velm_kernels.attention.triton_kernels.tiles import (
    FAR_ROW,
    LOWEST,
    NOTHING,
    extents,
    kept,
    key_rows_ok,
    key_tiles,
    probabilities,
    query_block,
    scores,
    unless_infinite,
)
from velm_kernels.triton.kernels import LN2, LOG2E, round_to, to_int64


@triton.jit
def _online_softmax(
    accs,
    b_max,
    b_shift,
    b_sum,
    q,
    p_k,
    p_v,
    stride_k,
    stride_v,
    masks,
    dropout,
    scaling,
    block,
    b_head_index,
    part,
    first,
    last,
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
    """Online softmax over the key tiles from `first` to `last`: `b_max` is the largest score of a row, `b_shift` that
    in base 2. GUARDED: see `add_seen`.

    `b_max` is -inf of a row that has seen nothing yet, LOWEST of one that has seen nothing but -inf."""
    b_j = tl.arange(0, BLOCK_N)
    for tile in tl.range(first, last):
        start_n = tile * BLOCK_N
        b_ok = key_rows_ok(masks, block.b, start_n, block.lo, block.hi, BLOCK_N, MASKED)
        k = rows(p_k + to_int64(start_n) * stride_k, b_j, stride_k, b_ok, HEAD_DIM, BLOCK_D, INT64)
        # [BM, BN]
        b_qk = product_of_rows(q, k, HEAD_DIM, BLOCK_D, PRECISION)
        b_s = scores(masks, scaling, block, b_qk, b_ok, start_n, MASKED, False, True, BLOCK_N)
        # [BM]. NaN is never the largest; it gets into the sum.
        b_new_max = tl.maximum(b_max, tl.max(b_s, 1))
        if not (MASKED or (masks.key_mask is not None)):
            b_new_max = tl.maximum(b_new_max, LOWEST)
        # 0 for a row without a score yet, exp2(-inf - 0) = 0, and for one with an infinite score.
        b_new_shift = tl.where(tl.abs(b_new_max) >= -LOWEST, 0.0, b_new_max * LOG2E)
        # [BM, BN]. The product is not rounded, as its last place is larger the larger the score is.
        b_p = tl.exp2(tl.fma(b_s, LOG2E, -b_new_shift[:, None]))
        b_decay = tl.where(b_max <= LOWEST, 0.0, tl.exp2(b_shift - b_new_shift))
        b_sum = b_sum * b_decay + tl.sum(b_p, 1)
        b_max = b_new_max
        b_shift = b_new_shift
        if dropout is not None:
            b_p = tl.where(kept(dropout, b_head_index, block.b_m, start_n, BLOCK_N, False), b_p, 0.0)
        v = rows(p_v + to_int64(start_n) * stride_v, b_j, stride_v, b_ok, VALUE_DIM, BLOCK_DV, INT64)
        b_p = round_to(b_p, p_v.dtype.element_ty)
        if GUARDED:
            b_seen = b_s != NOTHING
            accs = add_seen(accs, b_decay[:, None], b_p, b_seen, v, part, VALUE_DIM, BLOCK_DV, PARTS, PRECISION)
        else:
            accs = add_weighted(accs, b_decay[:, None], b_p, v, part, VALUE_DIM, BLOCK_DV, PARTS, PRECISION)
    return accs, b_max, b_shift, b_sum


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
    dropout,
    scaling,
    sizes,
    query_blocks,
    splits,
    split_keys,
    CAUSAL: tl.constexpr,
    FIRST_PHASE: tl.constexpr,
    GUARDED: tl.constexpr,
    PACKED: tl.constexpr,
    SPLIT: tl.constexpr,
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
    """One block of query rows against all of its keys.

    PACKED: the rows are (query head of the group, query), so that the heads that share a key head read it once.
    SPLIT: the program handles `split_keys` keys only; `out` (splits, rows of logsumexp, VALUE_DIM) and `logsumexp`
    (splits, ...) are float32 partial results for `merge_splits_kernel`. PARTS programs share the columns of `out`.
    `flags` and GUARDED: see `report_nan`; FIRST_PHASE: see `key_tiles`.
    """
    if GUARDED:  # noqa: SIM102
        if not has_nan(flags, BLOCK_M):
            return
    part = tl.program_id(0) % PARTS
    rest = tl.program_id(0) // PARTS
    row_block = rest % query_blocks
    rest = rest // query_blocks
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
    e = extents(sizes, b)
    queries = e.queries

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

    block, full_lo, full_hi = query_block(masks, b, b_head, e.first_row, queries, e.keys, b_m, CAUSAL)
    lo = block.lo
    hi = block.hi
    if SPLIT:
        # split_keys is a multiple of BLOCK_N.
        lo = tl.maximum(lo, split * split_keys)
        hi = tl.minimum(hi, (split + 1) * split_keys)
    bounds = key_tiles(lo, hi, full_lo, full_hi, BLOCK_N, FIRST_PHASE)

    # The rows of a block may belong to several heads.
    p_q = row_of(query, query_strides, b, 0, e.start_q)
    b_q_offset = to_int64(b_head) * query_strides.head + to_int64(b_m) * query_strides.row
    # [BM, D]
    q = rows_at(p_q, b_q_offset, b_in, HEAD_DIM, BLOCK_D)
    p_k = row_of(key, key_strides, b, kv_head, e.start_k)
    p_v = row_of(value, value_strides, b, kv_head, e.start_k)

    accs = zero_pieces(BLOCK_M, VALUE_DIM, BLOCK_DV, PARTS)
    b_max = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    b_shift = tl.zeros((BLOCK_M,), tl.float32)
    b_sum = tl.zeros((BLOCK_M,), tl.float32)
    for phase in tl.static_range(FIRST_PHASE, 3):
        accs, b_max, b_shift, b_sum = _online_softmax(
            accs,
            b_max,
            b_shift,
            b_sum,
            q,
            p_k,
            p_v,
            key_strides.row,
            value_strides.row,
            masks,
            dropout,
            scaling,
            block,
            b * sizes.heads + b_head,
            part,
            bounds[phase],
            bounds[phase + 1],
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
        report_nan(flags, accs, BLOCK_M)

    # An empty row is 0. NaN is a result, that of an infinite sum too, and that of a sum of 0 of what is seen, all -inf.
    b_empty = (b_sum == 0.0) & (b_max == -float("inf"))
    b_scale = tl.where(b_sum == float("inf"), float("nan"), 1.0 / tl.where(b_empty, 1.0, b_sum))
    if SPLIT:
        # Other splits may have seen more.
        b_scale = tl.where(b_sum == 0.0, 1.0, b_scale)
    if dropout is not None:
        b_scale = b_scale * dropout.keep_scale
    # What the rounding of the shift has left in the sum is taken out of its logarithm.
    b_base = tl.where(tl.abs(b_max) >= -LOWEST, 0.0, b_max)
    b_log = tl.log2(tl.where(b_empty, 1.0, b_sum)) - tl.fma(b_base, LOG2E, -b_shift)
    b_lse = tl.where(b_empty, -float("inf"), b_base + b_log * LN2)
    if SPLIT:
        b_lse = tl.where((b_sum == 0.0) & (b_max == LOWEST), LOWEST, b_lse)

    b_lse_at = to_int64(b) * logsumexp_strides.batch + to_int64(b_head) * logsumexp_strides.head + e.start_q + b_m
    if SPLIT:
        # `logsumexp_strides.row` is the number of rows of one partial result.
        b_lse_at = b_lse_at + to_int64(split) * logsumexp_strides.row
        b_out_offset = b_lse_at * VALUE_DIM
    else:
        out = row_of(out, out_strides, b, 0, e.start_q)
        b_out_offset = to_int64(b_head) * out_strides.head + to_int64(b_m) * out_strides.row
    if not GUARDED:
        tl.store(logsumexp + b_lse_at, b_lse, mask=b_m < tl.where(part == 0, queries, 0))
    store_pieces(out, b_out_offset, b_in, accs, b_scale[:, None], part, GUARDED, VALUE_DIM, BLOCK_DV, PARTS)


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
    """Merge partial results over keys, in the order of the keys, whatever order they were computed in. The logsumexp of
    a part that sees nothing but -inf is LOWEST."""
    b_row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    b_in = b_row < rows
    b_dv = tl.arange(0, BLOCK_DV)
    b_ok = b_in[:, None] & (b_dv < VALUE_DIM)[None, :]
    b_max = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    b_sum = tl.zeros((BLOCK_M,), tl.float32)
    b_acc = tl.zeros((BLOCK_M, BLOCK_DV), tl.float32)
    for split in tl.range(0, splits):
        b_at = to_int64(split) * rows + b_row
        b_lse = tl.load(partial_logsumexp + b_at, mask=b_in, other=-float("inf"))
        b_out = tl.load(partial_out + (b_at * VALUE_DIM)[:, None] + b_dv[None, :], mask=b_ok, other=0.0)
        b_new_max = tl.maximum(b_max, b_lse)
        b_shift = tl.where(tl.abs(b_new_max) >= -LOWEST, 0.0, b_new_max)
        b_decay = tl.exp(b_max - b_shift)
        b_weight = tl.exp(b_lse - b_shift)
        b_acc = b_acc * b_decay[:, None] + b_out * b_weight[:, None]
        b_sum = b_sum * b_decay + b_weight
        b_max = b_new_max
    b_empty = (b_sum == 0.0) & (b_max == -float("inf"))
    b_safe = tl.where(b_empty, 1.0, b_sum)
    tl.store(logsumexp + b_row, tl.where(b_empty, -float("inf"), b_max + tl.log(b_safe)), mask=b_in)
    b = b_row // (heads * queries)
    b_head = (b_row // queries) % heads
    b_m = b_row % queries
    p_rows = (
        out + to_int64(b) * out_strides.batch + to_int64(b_head) * out_strides.head + to_int64(b_m) * out_strides.row
    )
    tl.store(p_rows[:, None] + b_dv[None, :], round_to(b_acc / b_safe[:, None], out.dtype.element_ty), mask=b_ok)


@triton.jit
def row_shift_kernel(
    query,
    key,
    logsumexp,
    shift,
    query_strides,
    key_strides,
    logsumexp_strides,
    masks,
    scaling,
    sizes,
    query_blocks,
    CAUSAL: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    INT64: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """What a row's exp(score - logsumexp) have to be multiplied with, in base 2, so that they sum up to 1: 0 unless
    the logsumexp is so large that it has lost the logarithm of the sum (FAR_ROW). Blocks without such a row, which are
    all but those that a finite bias hides altogether, read nothing else."""
    row_block = tl.program_id(0) % query_blocks
    head = (tl.program_id(0) // query_blocks) % sizes.heads
    b = tl.program_id(0) // query_blocks // sizes.heads
    e = extents(sizes, b)
    start_m = row_block * BLOCK_M
    if start_m >= e.queries:
        return
    b_i = tl.arange(0, BLOCK_M)
    b_j = tl.arange(0, BLOCK_N)
    b_m = start_m + b_i
    b_in = b_m < e.queries
    lse_at = to_int64(b) * logsumexp_strides.batch + to_int64(head) * logsumexp_strides.head + e.start_q
    b_lse = tl.load(logsumexp + lse_at + b_m, mask=b_in, other=0.0)
    b_far = (tl.abs(b_lse) >= FAR_ROW) & (tl.abs(b_lse) < float("inf"))
    b_sum = tl.zeros((BLOCK_M,), tl.float32)
    if tl.max(b_far.to(tl.int32), 0) != 0:
        block, _full_lo, _full_hi = query_block(masks, b, head, e.first_row, e.queries, e.keys, b_m, CAUSAL)
        p_q = row_of(query, query_strides, b, head, e.start_q + start_m)
        p_k = row_of(key, key_strides, b, head // sizes.group, e.start_k)
        q = rows(p_q, b_i, query_strides.row, b_far, HEAD_DIM, BLOCK_D, INT64)
        for tile in tl.range(block.lo // BLOCK_N, tl.cdiv(block.hi, BLOCK_N)):
            start_n = tile * BLOCK_N
            b_ok = key_rows_ok(masks, b, start_n, block.lo, block.hi, BLOCK_N, True)
            k = rows(p_k + to_int64(start_n) * key_strides.row, b_j, key_strides.row, b_ok, HEAD_DIM, BLOCK_D, INT64)
            # [BM, BN]
            b_qk = product_of_rows(q, k, HEAD_DIM, BLOCK_D, PRECISION)
            b_s = scores(masks, scaling, block, b_qk, b_ok, start_n, True, False, False, BLOCK_N)
            b_log = b_lse[:, None]
            b_sum += tl.sum(probabilities(b_s, b_log, b_log, None, 0, b_m, start_n, False, True, BLOCK_N, False), 1)
    tl.store(shift + lse_at + b_m, tl.where(b_far, -tl.log2(tl.where(b_far, b_sum, 1.0)), 0.0), mask=b_in)


@triton.jit
def key_mass_kernel(
    query,
    key,
    logsumexp,
    shift,
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
    INT64: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Column sums of the probabilities, one block of keys of one query head per program."""
    key_block = tl.program_id(0) % key_blocks
    head = (tl.program_id(0) // key_blocks) % sizes.heads
    b = tl.program_id(0) // key_blocks // sizes.heads
    e = extents(sizes, b)
    start_n = key_block * BLOCK_N
    if start_n >= e.keys:
        return
    b_j = tl.arange(0, BLOCK_N)
    p_k = row_of(key, key_strides, b, head // sizes.group, e.start_k + start_n)
    p_q = row_of(query, query_strides, b, head, e.start_q)
    lse_at = to_int64(b) * logsumexp_strides.batch + to_int64(head) * logsumexp_strides.head + e.start_q
    p_lse = logsumexp + lse_at
    SHIFTS: tl.constexpr = shift is not None
    p_shift = p_lse
    if SHIFTS:
        p_shift = shift + lse_at
    b_ok = key_rows_ok(masks, b, start_n, 0, e.keys, BLOCK_N, True)
    k = rows(p_k, b_j, key_strides.row, b_ok, HEAD_DIM, BLOCK_D, INT64)
    b_mass = tl.zeros((BLOCK_N,), tl.float32)
    b_i = tl.arange(0, BLOCK_M)
    first = 0
    if CAUSAL:
        first = start_n // BLOCK_M
    for tile in tl.range(first, tl.cdiv(e.queries, BLOCK_M)):
        start_m = tile * BLOCK_M
        b_m = start_m + b_i
        b_in = b_m < e.queries
        block, _full_lo, _full_hi = query_block(masks, b, head, e.first_row, e.queries, e.keys, b_m, CAUSAL)
        wanted = True
        if masks.range_start is not None:
            wanted = (block.lo < start_n + BLOCK_N) & (block.hi > start_n)
        if wanted:
            b_lse = tl.load(p_lse + b_m, mask=b_in, other=-float("inf"))
            p_rows = p_q + to_int64(start_m) * query_strides.row
            q = rows(p_rows, b_i, query_strides.row, b_in, HEAD_DIM, BLOCK_D, INT64)
            # [BN, BM]
            b_qk = product_of_rows(k, q, HEAD_DIM, BLOCK_D, PRECISION)
            b_s = scores(masks, scaling, block, b_qk, b_ok, start_n, True, True, False, BLOCK_N)
            b_shift = b_lse[None, :]
            if SHIFTS:
                b_shift = tl.load(p_shift + b_m, mask=b_in, other=0.0)[None, :]
            b_lse = unless_infinite(b_lse)[None, :]
            b_p = probabilities(b_s, b_lse, b_shift, None, 0, b_m, start_n, SHIFTS, True, BLOCK_N, True)
            b_mass += tl.sum(b_p, 1)
    p_mass = key_mass + to_int64(b) * mass_strides.batch + to_int64(head) * mass_strides.head + e.start_k + start_n
    tl.store(p_mass + b_j, b_mass, mask=start_n + b_j < e.keys)
