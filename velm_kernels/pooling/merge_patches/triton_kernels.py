"""The Triton kernel of merge_patches."""

from __future__ import annotations

import triton
import triton.language as tl

from velm_kernels.pooling.triton_kernels import first_tokens, place_of
from velm_kernels.triton.kernels import to_int64


@triton.jit
def merge_patches_kernel(
    x,
    merged,
    windows,
    batch_stride,
    row_stride,
    merged_batch_stride,
    merged_row_stride,
    tokens,
    rows,
    width,
    factor,
    dim,
    blocks,
    dim_blocks,
    CHANNELS: tl.constexpr,
    BACK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The tokens of [BM] squares beside each other, zeros where there are none; with BACK what is beside each other
    goes to the tokens."""
    batch, b_row, b_column = place_of(blocks, dim_blocks, BLOCK_M, BLOCK_N)
    b_some, b_in = b_row < rows, b_column < dim
    b_first, b_width = first_tokens(windows, batch, b_row, b_some, rows, tokens, width, factor)
    b_live = (b_first >= 0)[:, None] & b_in[None, :]
    count = factor * factor
    p_x = x + to_int64(batch) * batch_stride + b_column[None, :]
    p_merged = merged + to_int64(batch) * merged_batch_stride + to_int64(b_row)[:, None] * merged_row_stride
    for member in tl.range(0, count):
        b_token = b_first + (member // factor) * b_width + member % factor
        p_token = p_x + to_int64(b_token)[:, None] * row_stride
        if CHANNELS:
            p_feature = p_merged + (to_int64(b_column) * count + member)[None, :]
        else:
            p_feature = p_merged + (to_int64(b_column) + to_int64(member) * dim)[None, :]
        if BACK:
            tl.store(p_token, tl.load(p_feature, mask=b_live, other=0.0), mask=b_live)
        else:
            b_x = tl.load(p_token, mask=b_live, other=0.0)
            tl.store(p_feature, b_x, mask=b_some[:, None] & b_in[None, :])
