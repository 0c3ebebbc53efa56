"""Triton kernel of dropout_residual."""

from __future__ import annotations

import triton
import triton.language as tl

from velm_kernels.triton.kernels import round_to, to_int64


@triton.jit
def dropout_residual_kernel(
    x,
    residual,
    out,
    seed,
    drop_below,
    keep_scale,
    x_stride,
    residual_stride,
    rows,
    dim,
    dim_blocks,
    BLOCK_M: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    """out = residual + dropout(x), or dropout(x) where there is no residual; the sum is rounded once.

    A counter of the generator serves column j of each of four runs of 16 columns, its four words: a thread draws the
    words of what it reads, and no random number travels between threads."""
    b_row = to_int64(tl.program_id(0) // dim_blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    b_group = (tl.program_id(0) % dim_blocks) * BLOCK_G + tl.arange(0, BLOCK_G)
    b_j = tl.arange(0, 16)
    # [BM, BG, 16]
    b_row = b_row[:, None, None]
    b_counter = b_group[None, :, None] * 16 + b_j[None, None, :]
    b_c0 = b_counter + (b_row * 0).to(tl.int32)
    b_c1 = b_row.to(tl.int32) + b_counter * 0
    b_c2 = (b_row >> 32).to(tl.int32) + b_counter * 0
    b_words = tl.philox(tl.load(seed), b_c0, b_c1, b_c2, b_c0 * 0)
    drop_below = tl.cast(drop_below, tl.uint32)
    for run in tl.static_range(4):
        b_column = b_group[None, :, None] * 64 + run * 16 + b_j[None, None, :]
        b_ok = (b_row < rows) & (b_column < dim)
        b_x = tl.load(x + b_row * x_stride + b_column, mask=b_ok, other=0.0).to(tl.float32)
        # Selected, not multiplied by 0: what is dropped may be infinite.
        b_y = tl.where(b_words[run] >= drop_below, b_x * keep_scale, 0.0)
        if residual is not None:
            b_y += tl.load(residual + b_row * residual_stride + b_column, mask=b_ok, other=0.0).to(tl.float32)
        tl.store(out + b_row * dim + b_column, round_to(b_y, out.dtype.element_ty), mask=b_ok)
