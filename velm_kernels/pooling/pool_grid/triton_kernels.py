"""The Triton kernels of pool_grid."""

from __future__ import annotations

import triton
import triton.language as tl

from velm_kernels.pooling.triton_kernels import first_tokens, place_of
from velm_kernels.triton.kernels import round_to, to_int64


@triton.jit
def pool_grid_kernel(
    x,
    out,
    windows,
    batch_stride,
    row_stride,
    tokens,
    rows,
    width,
    factor,
    dim,
    blocks,
    dim_blocks,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """A tile of the means [BM, BN]."""
    batch, b_row, b_column = place_of(blocks, dim_blocks, BLOCK_M, BLOCK_N)
    b_some, b_in = b_row < rows, b_column < dim
    b_first, b_width = first_tokens(windows, batch, b_row, b_some, rows, tokens, width, factor)
    b_live = (b_first >= 0)[:, None] & b_in[None, :]
    p_x = x + to_int64(batch) * batch_stride + b_column[None, :]
    b_sum = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for member in tl.range(0, factor * factor):
        b_token = b_first + (member // factor) * b_width + member % factor
        b_sum += tl.load(p_x + to_int64(b_token)[:, None] * row_stride, mask=b_live, other=0.0).to(tl.float32)
    b_mean = b_sum * (1.0 / (factor * factor))
    p_out = out + (to_int64(batch) * rows + b_row)[:, None] * dim + b_column[None, :]
    tl.store(p_out, round_to(b_mean, out.dtype.element_ty), mask=b_some[:, None] & b_in[None, :])


@triton.jit
def pool_grid_backward_kernel(
    grad,
    grad_x,
    windows,
    batch_stride,
    row_stride,
    tokens,
    rows,
    width,
    factor,
    dim,
    blocks,
    dim_blocks,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The gradients of the tokens of [BM] squares: no two have a token in common."""
    batch, b_row, b_column = place_of(blocks, dim_blocks, BLOCK_M, BLOCK_N)
    b_first, b_width = first_tokens(windows, batch, b_row, b_row < rows, rows, tokens, width, factor)
    b_live = (b_first >= 0)[:, None] & (b_column < dim)[None, :]
    p_grad = grad + to_int64(batch) * batch_stride + to_int64(b_row)[:, None] * row_stride + b_column[None, :]
    b_grad = tl.load(p_grad, mask=b_live, other=0.0).to(tl.float32) * (1.0 / (factor * factor))
    b_grad = round_to(b_grad, grad_x.dtype.element_ty)
    p_x = grad_x + to_int64(batch) * tokens * dim + b_column[None, :]
    for member in tl.range(0, factor * factor):
        b_token = b_first + (member // factor) * b_width + member % factor
        tl.store(p_x + to_int64(b_token)[:, None] * dim, b_grad, mask=b_live)
