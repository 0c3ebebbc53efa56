"""Triton kernels of match_rows."""

from __future__ import annotations

import triton
import triton.language as tl

from velm_kernels.triton.kernels import MAX_INDEX, product_add, to_int64


@triton.jit
def inverse_norms_kernel(
    x, inverse_norms, batch_stride, row_stride, rows, dim, blocks, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr
):
    """One over the norms of a tile of rows, 0 for rows of zeros."""
    batch = tl.program_id(0) // blocks
    b_row = (tl.program_id(0) % blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    b_some = b_row < rows
    p_x = x + to_int64(batch) * batch_stride + to_int64(b_row)[:, None] * row_stride
    b_sum = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for column in tl.range(0, dim, BLOCK_D):
        b_d = column + tl.arange(0, BLOCK_D)
        b_x = tl.load(p_x + b_d[None, :], mask=b_some[:, None] & (b_d < dim)[None, :], other=0.0).to(tl.float32)
        b_sum += b_x * b_x
    b_square = tl.sum(b_sum, 1)
    b_inverse = tl.where(b_square == 0.0, 0.0, 1.0 / tl.sqrt_rn(tl.where(b_square == 0.0, 1.0, b_square)))
    tl.store(inverse_norms + to_int64(batch) * rows + b_row, b_inverse, mask=b_some)


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
    p_a = a + to_int64(batch) * a_batch + to_int64(b_m)[:, None] * a_row
    b_most = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    b_where = tl.zeros((BLOCK_M,), tl.int32)
    for first in tl.range(0, columns, BLOCK_N):
        b_n = first + tl.arange(0, BLOCK_N)
        p_b = b + to_int64(batch) * b_batch + to_int64(b_n)[None, :] * b_row
        b_sum = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for column in tl.range(0, dim, BLOCK_D):
            b_d = column + tl.arange(0, BLOCK_D)
            b_in = b_d < dim
            b_x = tl.load(p_a + b_d[None, :], mask=b_some[:, None] & b_in[None, :], other=0.0)
            b_y = tl.load(p_b + b_d[:, None], mask=b_in[:, None] & (b_n < columns)[None, :], other=0.0)
            b_sum = product_add(b_x, b_y, b_sum, PRECISION)
        b_inverse = tl.load(b_norms + to_int64(batch) * columns + b_n, mask=b_n < columns, other=0.0)
        b_score = b_sum * b_inverse[None, :]
        # NaN is never the largest.
        b_score = tl.where((b_score == b_score) & (b_n < columns)[None, :], b_score, float("-inf"))
        b_largest = tl.max(b_score, 1)
        b_first = tl.min(tl.where(b_score == b_largest[:, None], b_n[None, :], MAX_INDEX), 1)
        b_where = tl.where(b_largest > b_most, b_first, b_where)
        b_most = tl.maximum(b_most, b_largest)
    b_most = b_most * tl.load(a_norms + to_int64(batch) * rows + b_m, mask=b_some, other=0.0)
    b_most = tl.where(b_most == b_most, b_most, float("-inf"))
    tl.store(similarity + to_int64(batch) * rows + b_m, b_most, mask=b_some)
    tl.store(best + to_int64(batch) * rows + b_m, b_where, mask=b_some)
