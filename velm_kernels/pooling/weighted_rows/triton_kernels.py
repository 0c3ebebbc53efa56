"""The Triton kernels of weighted_rows."""

from __future__ import annotations

import triton
import triton.language as tl

from velm_kernels.triton.kernels import round_to, to_int64


@triton.jit
def weighted_rows_kernel(
    x,
    out,
    index,
    offsets,
    weight,
    batch_stride,
    row_stride,
    rows,
    taps,
    out_rows,
    dim,
    blocks,
    dim_blocks,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """A tile of the result [BM, BN]: each row is the sum of `taps` entries, or of those between its offsets."""
    batch = tl.program_id(0) // (blocks * dim_blocks)
    b_row = ((tl.program_id(0) // dim_blocks) % blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    b_column = (tl.program_id(0) % dim_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    b_some, b_in = b_row < out_rows, b_column < dim
    if offsets is None:
        b_first = b_row * taps
        b_last = tl.where(b_some, b_first + taps, b_first)
        most = taps
    else:
        b_first = tl.load(offsets + b_row, mask=b_some, other=0)
        b_last = tl.load(offsets + b_row + 1, mask=b_some, other=0)
        most = tl.max(b_last - b_first, 0)
    p_x = x + to_int64(batch) * batch_stride + b_column[None, :]
    b_sum = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for entry in tl.range(0, most):
        b_is = b_first + entry < b_last
        b_index = tl.load(index + b_first + entry, mask=b_is, other=-1)
        b_live = (b_index >= 0) & (b_index < rows)
        b_weight = tl.load(weight + b_first + entry, mask=b_live, other=0.0)
        p_row = p_x + to_int64(tl.where(b_live, b_index, 0))[:, None] * row_stride
        b_x = tl.load(p_row, mask=b_live[:, None] & b_in[None, :], other=0.0).to(tl.float32)
        b_sum += b_x * b_weight[:, None]
    p_out = out + (to_int64(batch) * out_rows + b_row)[:, None] * dim + b_column[None, :]
    tl.store(p_out, round_to(b_sum, out.dtype.element_ty), mask=b_some[:, None] & b_in[None, :])


@triton.jit
def tap_dots_kernel(
    grad,
    x,
    index,
    out,
    grad_batch_stride,
    grad_row_stride,
    batch_stride,
    row_stride,
    batch,
    rows,
    entries,
    taps,
    dim,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The gradients of [BM] weights: the row of grad of each entry times the row of x that it reads."""
    b_entry = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    b_some = b_entry < entries
    b_index = tl.load(index + b_entry, mask=b_some, other=-1)
    b_live = (b_index >= 0) & (b_index < rows)
    p_grad = grad + to_int64(b_entry // taps)[:, None] * grad_row_stride
    p_x = x + to_int64(tl.where(b_live, b_index, 0))[:, None] * row_stride
    b_sum = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for of in tl.range(0, batch):
        for start in tl.range(0, dim, BLOCK_N):
            b_column = start + tl.arange(0, BLOCK_N)
            b_mask = b_live[:, None] & (b_column < dim)[None, :]
            p_both = b_column[None, :]
            b_grad = tl.load(p_grad + to_int64(of) * grad_batch_stride + p_both, mask=b_mask, other=0.0)
            b_x = tl.load(p_x + to_int64(of) * batch_stride + p_both, mask=b_mask, other=0.0)
            b_sum += b_grad.to(tl.float32) * b_x.to(tl.float32)
    tl.store(out + b_entry, tl.sum(b_sum, 1), mask=b_some)
