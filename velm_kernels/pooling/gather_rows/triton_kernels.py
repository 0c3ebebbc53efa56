"""The Triton kernel of gather_rows."""

from __future__ import annotations

import triton
import triton.language as tl

from velm_kernels.triton.kernels import round_to, to_int64


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
        p_bounds = offsets + to_int64(batch) * (out_rows + 1) + b_row
        b_first = tl.maximum(tl.load(p_bounds, mask=b_some, other=0), 0)
        b_last = tl.minimum(tl.load(p_bounds + 1, mask=b_some, other=0), entries)
        most = tl.max(b_last - b_first, 0)
    p_x = x + to_int64(batch) * batch_stride + b_column[None, :]
    b_sum = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for entry in tl.range(0, most):
        b_at = to_int64(batch) * entries + b_first + entry
        b_index = tl.load(index + b_at, mask=b_first + entry < b_last, other=-1)
        b_live = (b_index >= 0) & (b_index < rows)
        p_row = p_x + to_int64(tl.where(b_live, b_index, 0))[:, None] * row_stride
        b_x = tl.load(p_row, mask=b_live[:, None] & b_in[None, :], other=0.0).to(tl.float32)
        if weight is not None:
            b_weight = tl.load(weight + b_at, mask=b_live, other=0.0)
            b_x = b_x * b_weight[:, None]
        b_sum += b_x
    p_out = out + (to_int64(batch) * out_rows + b_row)[:, None] * dim + b_column[None, :]
    tl.store(p_out, round_to(b_sum, out.dtype.element_ty), mask=b_some[:, None] & b_in[None, :])
