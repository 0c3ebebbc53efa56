"""Triton kernels that select and merge tokens."""

from __future__ import annotations

import triton
import triton.language as tl

from velm_kernels.attention.triton_tiles import FAR, product_add, round_to, wide


@triton.jit
def gather_rows_kernel(
    x,
    out,
    index,
    offsets,
    weight,
    batch_stride,
    row_stride,
    rows,
    entries,
    out_rows,
    dim,
    blocks,
    dim_blocks,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """A tile of the result [BM, BN]: the rows have as many entries as the one that has most."""
    batch = tl.program_id(0) // (blocks * dim_blocks)
    b_row = ((tl.program_id(0) // dim_blocks) % blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    b_column = (tl.program_id(0) % dim_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    b_some, b_in = b_row < out_rows, b_column < dim
    if offsets is None:
        b_first, b_last = b_row, tl.where(b_some, b_row + 1, b_row)
        most = 1
    else:
        p_bounds = offsets + wide(batch) * (out_rows + 1) + b_row
        b_first = tl.maximum(tl.load(p_bounds, mask=b_some, other=0), 0)
        b_last = tl.minimum(tl.load(p_bounds + 1, mask=b_some, other=0), entries)
        most = tl.max(b_last - b_first, 0)
    p_x = x + wide(batch) * batch_stride + b_column[None, :]
    b_sum = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for entry in tl.range(0, most):
        b_at = wide(batch) * entries + b_first + entry
        b_index = tl.load(index + b_at, mask=b_first + entry < b_last, other=-1)
        b_live = (b_index >= 0) & (b_index < rows)
        p_row = p_x + wide(tl.where(b_live, b_index, 0))[:, None] * row_stride
        b_x = tl.load(p_row, mask=b_live[:, None] & b_in[None, :], other=0.0).to(tl.float32)
        if weight is not None:
            b_weight = tl.load(weight + b_at, mask=b_live, other=0.0)
            b_x = b_x * b_weight[:, None]
        b_sum += b_x
    p_out = out + (wide(batch) * out_rows + b_row)[:, None] * dim + b_column[None, :]
    tl.store(p_out, round_to(b_sum, out.dtype.element_ty), mask=b_some[:, None] & b_in[None, :])


@triton.jit
def inverse_norms_kernel(
    x, inverse_norms, batch_stride, row_stride, rows, dim, blocks, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr
):
    """One over the norms of a tile of rows, 0 for rows of zeros."""
    batch = tl.program_id(0) // blocks
    b_row = (tl.program_id(0) % blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    b_some = b_row < rows
    p_x = x + wide(batch) * batch_stride + wide(b_row)[:, None] * row_stride
    b_sum = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for column in tl.range(0, dim, BLOCK_D):
        b_d = column + tl.arange(0, BLOCK_D)
        b_x = tl.load(p_x + b_d[None, :], mask=b_some[:, None] & (b_d < dim)[None, :], other=0.0).to(tl.float32)
        b_sum += b_x * b_x
    b_square = tl.sum(b_sum, 1)
    b_inverse = tl.where(b_square == 0.0, 0.0, 1.0 / tl.sqrt_rn(tl.where(b_square == 0.0, 1.0, b_square)))
    tl.store(inverse_norms + wide(batch) * rows + b_row, b_inverse, mask=b_some)


@triton.jit
def match_rows_kernel(
    a,
    b,
    a_norms,
    b_norms,
    similarity,
    best,
    a_batch,
    a_row,
    b_batch,
    b_row,
    rows,
    columns,
    dim,
    blocks,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """For a tile of rows of `a` the row of `b` in the most similar direction: tiles of similarities [BM, BN] are
    reduced where they are."""
    batch = tl.program_id(0) // blocks
    b_m = (tl.program_id(0) % blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    b_some = b_m < rows
    p_a = a + wide(batch) * a_batch + wide(b_m)[:, None] * a_row
    b_most = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    b_where = tl.zeros((BLOCK_M,), tl.int32)
    for first in tl.range(0, columns, BLOCK_N):
        b_n = first + tl.arange(0, BLOCK_N)
        p_b = b + wide(batch) * b_batch + wide(b_n)[None, :] * b_row
        b_sum = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for column in tl.range(0, dim, BLOCK_D):
            b_d = column + tl.arange(0, BLOCK_D)
            b_in = b_d < dim
            b_x = tl.load(p_a + b_d[None, :], mask=b_some[:, None] & b_in[None, :], other=0.0)
            b_y = tl.load(p_b + b_d[:, None], mask=b_in[:, None] & (b_n < columns)[None, :], other=0.0)
            b_sum = product_add(b_x, b_y, b_sum, PRECISION)
        b_inverse = tl.load(b_norms + wide(batch) * columns + b_n, mask=b_n < columns, other=0.0)
        b_score = b_sum * b_inverse[None, :]
        # NaN is never the largest.
        b_score = tl.where((b_score == b_score) & (b_n < columns)[None, :], b_score, float("-inf"))
        b_largest = tl.max(b_score, 1)
        b_first = tl.min(tl.where(b_score == b_largest[:, None], b_n[None, :], FAR), 1)
        b_where = tl.where(b_largest > b_most, b_first, b_where)
        b_most = tl.maximum(b_most, b_largest)
    b_most = b_most * tl.load(a_norms + wide(batch) * rows + b_m, mask=b_some, other=0.0)
    b_most = tl.where(b_most == b_most, b_most, float("-inf"))
    tl.store(similarity + wide(batch) * rows + b_m, b_most, mask=b_some)
    tl.store(best + wide(batch) * rows + b_m, b_where, mask=b_some)
