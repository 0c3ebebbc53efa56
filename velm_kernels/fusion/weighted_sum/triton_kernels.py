"""Triton kernels of weighted_sum, forward and backward."""

from __future__ import annotations

import triton
import triton.language as tl

from velm_kernels.triton.kernels import round_to, to_int64


@triton.jit
def weighted_sum_kernel(
    features,
    strides,
    weights,
    before,
    out,
    regions,
    dim,
    count,
    row_blocks,
    column_blocks,
    FEATURES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """out = the sum of the features (a tuple of tensors) times their weights, in order, plus `before`."""
    program = tl.program_id(0)
    part = program // column_blocks
    batch = to_int64(part // row_blocks)
    b_row = (part % row_blocks) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    b_column = (program % column_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    b_ok = (b_row < regions) & (b_column < dim)
    b_at = (batch * regions + b_row) * dim + b_column
    b_sum = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if before is not None:
        b_sum += tl.load(before + b_at, mask=b_ok, other=0.0)
    for i in tl.static_range(FEATURES):
        weight = tl.load(weights + batch * count + i)
        p_x = features[i] + batch * strides[i][0] + to_int64(b_row) * strides[i][1] + b_column
        b_sum += weight * tl.load(p_x, mask=b_ok, other=0.0).to(tl.float32)
    tl.store(out + b_at, round_to(b_sum, out.dtype.element_ty), mask=b_ok)


@triton.jit
def weighted_sum_backward_kernel(
    grad,
    features,
    strides,
    grads,
    weights,
    products,
    sums,
    batches,
    regions,
    dim,
    count,
    row_blocks,
    column_blocks,
    FEATURES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The gradients of features (a tuple; None where none is wanted), each program's share of their products with grad,
    (row_blocks * column_blocks, batches, count), and of the sum of grad over regions, (row_blocks, batches, dim)."""
    program = tl.program_id(0)
    part = program // column_blocks
    block = part % row_blocks
    batch = to_int64(part // row_blocks)
    b_row = block * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    b_column = (program % column_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    b_ok = (b_row < regions) & (b_column < dim)
    b_at = (batch * regions + b_row) * dim + b_column
    b_g = tl.load(grad + b_at, mask=b_ok, other=0.0).to(tl.float32)
    piece = to_int64(block) * column_blocks + program % column_blocks
    for i in tl.static_range(FEATURES):
        if features[i] is not None:
            p_x = features[i] + batch * strides[i][0] + to_int64(b_row) * strides[i][1] + b_column
            b_product = tl.sum(b_g * tl.load(p_x, mask=b_ok, other=0.0).to(tl.float32))
            tl.store(products + (piece * batches + batch) * count + i, b_product)
        if grads[i] is not None:
            weight = tl.load(weights + batch * count + i)
            tl.store(grads[i] + b_at, round_to(b_g * weight, grads[i].dtype.element_ty), mask=b_ok)
    if sums is not None:
        b_to = (program % column_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
        tl.store(sums + (to_int64(block) * batches + batch) * dim + b_to, tl.sum(b_g, 0), mask=b_to < dim)
