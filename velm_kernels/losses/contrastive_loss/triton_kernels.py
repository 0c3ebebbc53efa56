"""Triton kernels of contrastive_loss: the passes over a tile of products (rows, columns)."""

from __future__ import annotations

import triton
import triton.language as tl

from velm_kernels.triton.kernels import round_to, to_int64

LARGEST = tl.constexpr(3.4028234663852886e38)


@triton.jit
def statistics_kernel(
    tile,
    scale,
    bias,
    labels,
    other_labels,
    targets,
    sums,
    line_stride,
    step_stride,
    target_line_stride,
    target_step_stride,
    sums_stride,
    lines,
    steps,
    diagonal,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Sums over the steps of BLOCK_M lines, which are rows or columns, joined to what `sums` (3, lines) holds: what is
    taken off scores, the sum of their exponentials without the pair, and of the scores of targets."""
    b_line = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    b_in = b_line < lines
    factor = tl.load(scale)
    offset = tl.load(bias) if bias is not None else 0.0
    b_base = tl.load(sums + b_line, mask=b_in, other=0.0)
    b_sum = tl.load(sums + sums_stride + b_line, mask=b_in, other=0.0)
    b_positive = tl.load(sums + 2 * sums_stride + b_line, mask=b_in, other=0.0)
    b_row = to_int64(b_line)
    for start in tl.range(0, steps, BLOCK_N):
        b_step = start + tl.arange(0, BLOCK_N)
        b_ok = b_in[:, None] & (b_step < steps)[None, :]
        p_tile = tile + (b_row * line_stride)[:, None] + (to_int64(b_step) * step_stride)[None, :]
        b_z = factor * tl.load(p_tile, mask=b_ok, other=0.0).to(tl.float32) + offset
        b_seen = b_ok
        if labels is not None:
            b_label = tl.load(labels + b_line, mask=b_in, other=-1)
            b_other = tl.load(other_labels + b_step, mask=b_step < steps, other=-1)
            b_own = b_ok & (b_label[:, None] == b_other[None, :]) & (b_label >= 0)[:, None]
            b_positive += tl.sum(tl.where(b_own, b_z, 0.0), 1)
        elif targets is not None:
            p_target = targets + (b_row * target_line_stride)[:, None]
            b_target = tl.load(p_target + (to_int64(b_step) * target_step_stride)[None, :], mask=b_ok, other=0.0)
            b_positive += tl.sum(tl.where(b_ok, b_target * b_z, 0.0), 1)
        else:
            b_own = b_ok & (b_step[None, :] == b_line[:, None] + diagonal)
            b_positive += tl.sum(tl.where(b_own, b_z, 0.0), 1)
            b_seen = b_ok & (b_step[None, :] != b_line[:, None] + diagonal)
        b_z = tl.where(b_seen, b_z, -float("inf"))
        b_top = tl.maximum(b_base, tl.max(b_z, 1))
        b_taken = tl.where(b_top == -float("inf"), 0.0, tl.minimum(b_top, LARGEST))
        b_sum = b_sum * tl.exp(b_base - b_taken) + tl.sum(tl.exp(b_z - b_taken[:, None]), 1)
        b_base = b_top
    tl.store(sums + b_line, b_base, mask=b_in)
    tl.store(sums + sums_stride + b_line, b_sum, mask=b_in)
    tl.store(sums + 2 * sums_stride + b_line, b_positive, mask=b_in)


@triton.jit
def gradients_kernel(
    tile,
    scale,
    bias,
    row_labels,
    column_labels,
    row_targets,
    column_targets,
    row_factors,
    column_factors,
    row_factors_stride,
    column_factors_stride,
    rows,
    columns,
    diagonal,
    column_blocks,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The gradient of BLOCK_M x BLOCK_N scores in place of their products; factors are (4, rows) and (4, columns)."""
    program = tl.program_id(0)
    b_row = (program // column_blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    b_column = (program % column_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    b_in, b_inside = b_row < rows, b_column < columns
    b_ok = b_in[:, None] & b_inside[None, :]
    b_at = (to_int64(b_row) * columns)[:, None] + b_column[None, :]
    offset = tl.load(bias) if bias is not None else 0.0
    b_z = tl.load(scale) * tl.load(tile + b_at, mask=b_ok, other=0.0).to(tl.float32) + offset
    p_row, p_column = row_factors + b_row, column_factors + b_column
    b_of_row = tl.load(p_row, mask=b_in, other=0.0)
    b_of_column = tl.load(p_column, mask=b_inside, other=0.0)
    b_g = tl.exp(b_z - b_of_row[:, None]) * tl.load(p_row + row_factors_stride, mask=b_in, other=0.0)[:, None]
    b_weight = tl.load(p_column + column_factors_stride, mask=b_inside, other=0.0)
    b_g += tl.exp(b_z - b_of_column[None, :]) * b_weight[None, :]
    b_g -= tl.load(p_row + 2 * row_factors_stride, mask=b_in, other=0.0)[:, None]
    b_g -= tl.load(p_column + 2 * column_factors_stride, mask=b_inside, other=0.0)[None, :]
    b_row_target = tl.load(p_row + 3 * row_factors_stride, mask=b_in, other=0.0)
    b_column_target = tl.load(p_column + 3 * column_factors_stride, mask=b_inside, other=0.0)
    b_target = b_row_target[:, None] + b_column_target[None, :]
    if row_labels is not None:
        b_label = tl.load(row_labels + b_row, mask=b_in, other=-1)
        b_other = tl.load(column_labels + b_column, mask=b_inside, other=-1)
        b_own = (b_label[:, None] == b_other[None, :]) & (b_label >= 0)[:, None]
        b_g = tl.where(b_own, b_g - b_target, b_g)
    elif row_targets is not None:
        b_g -= b_row_target[:, None] * tl.load(row_targets + b_at, mask=b_ok, other=0.0)
        b_g -= b_column_target[None, :] * tl.load(column_targets + b_at, mask=b_ok, other=0.0)
    else:
        b_g = tl.where(b_column[None, :] == b_row[:, None] + diagonal, b_target, b_g)
    tl.store(tile + b_at, round_to(b_g, tile.dtype.element_ty), mask=b_ok)
