"""The Triton kernel of sigmoid_loss: the pass over a tile of products (rows, columns)."""

from __future__ import annotations

import triton
import triton.language as tl

from velm_kernels.triton.kernels import round_to, to_int64


@triton.jit
def sigmoid_pass_kernel(
    tile,
    scale,
    bias,
    row_labels,
    column_labels,
    weights,
    sums,
    sums_stride,
    rows,
    columns,
    diagonal,
    GRADIENTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Adds the losses of BLOCK_M rows to sums[0] and with GRADIENTS the gradients, which are left in the place of the
    products, to sums[1]."""
    b_row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    b_in = b_row < rows
    factor = tl.load(scale)
    offset = tl.load(bias) if bias is not None else 0.0
    b_loss = tl.load(sums + b_row, mask=b_in, other=0.0)
    b_total = tl.load(sums + sums_stride + b_row, mask=b_in, other=0.0)
    for start in tl.range(0, columns, BLOCK_N):
        b_column = start + tl.arange(0, BLOCK_N)
        b_ok = b_in[:, None] & (b_column < columns)[None, :]
        p_tile = tile + (to_int64(b_row) * columns)[:, None] + b_column[None, :]
        b_z = factor * tl.load(p_tile, mask=b_ok, other=0.0).to(tl.float32) + offset
        if row_labels is not None:
            b_label = tl.load(row_labels + b_row, mask=b_in, other=-1)
            b_other = tl.load(column_labels + b_column, mask=b_column < columns, other=-1)
            b_own = (b_label[:, None] == b_other[None, :]) & (b_label >= 0)[:, None]
        else:
            b_own = b_column[None, :] == b_row[:, None] + diagonal
        b_z = tl.where(b_own, -b_z, b_z)
        # log(1 + e^z) = max(z, 0) + log(1 + u), the latter by 2 atanh(u / (2 + u)): relative to itself for small u.
        b_u = tl.exp(-tl.abs(b_z))
        b_t = b_u / (2.0 + b_u)
        b_t2 = b_t * b_t
        b_series = b_t2 / 15 + 1.0 / 13
        b_series = b_series * b_t2 + 1.0 / 11
        b_series = b_series * b_t2 + 1.0 / 9
        b_series = b_series * b_t2 + 1.0 / 7
        b_series = b_series * b_t2 + 1.0 / 5
        b_series = b_series * b_t2 + 1.0 / 3
        b_series = (b_series * b_t2 + 1.0) * 2.0 * b_t
        b_loss += tl.sum(tl.where(b_ok, tl.where(b_z > 0, b_z, 0.0) + b_series, 0.0), 1)
        if GRADIENTS:
            b_whole = 1.0 / (1.0 + b_u)
            b_g = tl.where(b_z > 0, b_whole, b_u * b_whole)
            b_g = tl.where(b_own, -b_g, b_g)
            if weights is not None:
                b_g *= tl.load(weights + b_row, mask=b_in, other=0.0)[:, None]
            b_total += tl.sum(tl.where(b_ok, b_g, 0.0), 1)
            tl.store(p_tile, round_to(b_g, tile.dtype.element_ty), mask=b_ok)
    tl.store(sums + b_row, b_loss, mask=b_in)
    if GRADIENTS:
        tl.store(sums + sums_stride + b_row, b_total, mask=b_in)
