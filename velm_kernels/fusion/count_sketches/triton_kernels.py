"""The Triton kernel of count sketches."""

from __future__ import annotations

import triton
import triton.language as tl

from velm_kernels.triton.kernels import to_int64


@triton.jit
def count_sketch_kernel(
    x,
    order,
    bounds,
    sign,
    out,
    x_stride,
    rows,
    dim,
    column_blocks,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """out[row, bucket] = the sum over the features of the bucket of sign * x, in their order."""
    b_row = to_int64(tl.program_id(0) // column_blocks) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    b_bucket = (tl.program_id(0) % column_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    b_known = b_bucket < dim
    b_begin = tl.load(bounds + b_bucket, mask=b_known, other=0)
    b_count = tl.load(bounds + b_bucket + 1, mask=b_known, other=0) - b_begin
    b_sum = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in tl.range(0, tl.max(b_count)):
        b_has = k < b_count
        b_feature = tl.load(order + b_begin + k, mask=b_has, other=0)
        b_sign = tl.load(sign + b_feature, mask=b_has, other=0.0)
        b_ok = (b_row < rows) & b_has[None, :]
        b_x = tl.load(x + b_row * x_stride + b_feature[None, :], mask=b_ok, other=0.0).to(tl.float32)
        b_sum += b_sign[None, :] * b_x
    tl.store(out + b_row * dim + b_bucket[None, :], b_sum, mask=(b_row < rows) & b_known[None, :])
