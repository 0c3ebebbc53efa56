"""Triton kernels of rows by number."""

from __future__ import annotations

import triton
import triton.language as tl

from velm_kernels.triton.kernels import round_to, to_int64


@triton.jit
def placed_rows_kernel(
    base,
    ids,
    features,
    index,
    out,
    base_stride,
    feature_stride,
    rows,
    base_rows,
    count,
    dim,
    dim_blocks,
    ADD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """out = features[index] where index is a row of these, else base: its row `ids`, or of the same number. With ADD
    both; without base or features zeros in their place."""
    b_row = (tl.program_id(0) // dim_blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    b_column = (tl.program_id(0) % dim_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    b_some, b_in = b_row < rows, b_column < dim
    b_index = tl.load(index + b_row, mask=b_some, other=-1)
    b_live = (b_index >= 0) & (b_index < count)
    b_value = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if base is not None:
        if ids is not None:
            b_from = tl.minimum(tl.maximum(tl.load(ids + b_row, mask=b_some, other=0), 0), base_rows - 1)
            # Of no rows at all none is read.
            b_has = b_some & (b_from >= 0)
        else:
            b_from = b_row
            b_has = b_some
        if not ADD:
            b_has = b_has & ~b_live
        p_base = base + to_int64(b_from)[:, None] * base_stride + b_column[None, :]
        b_value = tl.load(p_base, mask=b_has[:, None] & b_in[None, :], other=0.0).to(tl.float32)
    if features is not None:
        p_feature = features + to_int64(tl.where(b_live, b_index, 0))[:, None] * feature_stride + b_column[None, :]
        b_feature = tl.load(p_feature, mask=b_live[:, None] & b_in[None, :], other=0.0).to(tl.float32)
        # Not added where there is none: that would lose the sign of a zero.
        b_value = tl.where(b_live[:, None], b_value + b_feature if ADD else b_feature, b_value)
    p_out = out + to_int64(b_row)[:, None] * dim + b_column[None, :]
    tl.store(p_out, round_to(b_value, out.dtype.element_ty), mask=b_some[:, None] & b_in[None, :])


@triton.jit
def summed_rows_kernel(
    grad,
    order,
    keys,
    ends,
    out,
    stride,
    vocabulary,
    dim,
    dim_blocks,
    BLOCK_N: tl.constexpr,
):
    """out[key] = the sum, in order, of the rows of grad with this key, by the program of the first of them: `order` are
    their numbers, sorted by key, `ends` where the run of each one's key ends."""
    entry = tl.program_id(0) // dim_blocks
    b_column = (tl.program_id(0) % dim_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    b_in = b_column < dim
    key = tl.load(keys + entry)
    before = tl.load(keys + tl.maximum(entry - 1, 0))
    if (key < vocabulary) & ((entry == 0) | (before != key)):
        b_sum = tl.zeros((BLOCK_N,), tl.float32)
        for at in tl.range(entry, tl.load(ends + entry)):
            row = tl.load(order + at)
            b_sum += tl.load(grad + to_int64(row) * stride + b_column, mask=b_in, other=0.0).to(tl.float32)
        tl.store(out + to_int64(key) * dim + b_column, round_to(b_sum, out.dtype.element_ty), mask=b_in)
