"""Triton kernels of film, forward and backward."""

from __future__ import annotations

import triton
import triton.language as tl

from velm_kernels.triton.kernels import round_to, to_int64


@triton.jit
def film_kernel(
    x,
    gamma,
    beta,
    out,
    x_batch_stride,
    x_stride,
    gamma_stride,
    beta_stride,
    offset,
    rows,
    columns,
    row_blocks,
    column_blocks,
    ALONG: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """out = (offset + gamma) * x + beta for a tile of an entry, whose columns are features, or with ALONG its rows."""
    program = tl.program_id(0)
    part = program // column_blocks
    batch = to_int64(part // row_blocks)
    b_row = (part % row_blocks) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    b_column = (program % column_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    b_ok = (b_row < rows) & (b_column < columns)
    b_feature = b_row if ALONG else b_column
    b_known = b_feature < (rows if ALONG else columns)
    b_gamma = tl.load(gamma + batch * gamma_stride + b_feature, mask=b_known, other=0.0).to(tl.float32) + offset
    b_beta = tl.load(beta + batch * beta_stride + b_feature, mask=b_known, other=0.0).to(tl.float32)
    b_x = tl.load(x + batch * x_batch_stride + to_int64(b_row) * x_stride + b_column, mask=b_ok, other=0.0).to(
        tl.float32
    )
    p_out = out + (batch * rows + b_row) * columns + b_column
    tl.store(p_out, round_to(b_gamma * b_x + b_beta, out.dtype.element_ty), mask=b_ok)


@triton.jit
def film_backward_kernel(
    grad,
    x,
    gamma,
    grad_x,
    gamma_parts,
    beta_parts,
    x_batch_stride,
    x_stride,
    gamma_stride,
    offset,
    batches,
    regions,
    dim,
    row_blocks,
    column_blocks,
    STEPS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """grad_x, and the sums of grad * x and grad over STEPS * BLOCK_M regions: (row_blocks, batches, dim)."""
    program = tl.program_id(0)
    part = program // column_blocks
    block = part % row_blocks
    batch = to_int64(part // row_blocks)
    b_column = (program % column_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    b_in = b_column < dim
    b_of_gamma = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    b_of_beta = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in tl.range(0, STEPS):
        b_row = (block * STEPS + step) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
        b_ok = (b_row < regions) & b_in
        b_at = (batch * regions + b_row) * dim + b_column
        b_g = tl.load(grad + b_at, mask=b_ok, other=0.0).to(tl.float32)
        if x is not None:
            p_x = x + batch * x_batch_stride + to_int64(b_row) * x_stride + b_column
            b_of_gamma += b_g * tl.load(p_x, mask=b_ok, other=0.0).to(tl.float32)
        b_of_beta += b_g
        if grad_x is not None:
            b_gamma = tl.load(gamma + batch * gamma_stride + b_column, mask=b_in, other=0.0).to(tl.float32) + offset
            tl.store(grad_x + b_at, round_to(b_g * b_gamma, grad_x.dtype.element_ty), mask=b_ok)
    b_to = (to_int64(block) * batches + batch) * dim + (program % column_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    b_kept = (program % column_blocks) * BLOCK_N + tl.arange(0, BLOCK_N) < dim
    if gamma_parts is not None:
        tl.store(gamma_parts + b_to, tl.sum(b_of_gamma, 0), mask=b_kept)
    if beta_parts is not None:
        tl.store(beta_parts + b_to, tl.sum(b_of_beta, 0), mask=b_kept)


@triton.jit
def film_along_backward_kernel(
    grad,
    x,
    gamma,
    grad_x,
    grad_gamma,
    grad_beta,
    x_batch_stride,
    x_stride,
    gamma_stride,
    offset,
    rows,
    regions,
    dim,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The gradients of BLOCK_M features, each of one entry, whose regions lie next to each other."""
    b_row = to_int64(tl.program_id(0)) * BLOCK_M + tl.arange(0, BLOCK_M)
    b_in = b_row < rows
    b_batch, b_feature = b_row // dim, b_row % dim
    b_of_gamma = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    b_of_beta = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in tl.range(0, regions, BLOCK_N):
        b_region = start + tl.arange(0, BLOCK_N)[None, :]
        b_ok = b_in[:, None] & (b_region < regions)
        b_at = b_row[:, None] * regions + b_region
        b_g = tl.load(grad + b_at, mask=b_ok, other=0.0).to(tl.float32)
        if x is not None:
            p_x = x + (b_batch * x_batch_stride + b_feature * x_stride)[:, None] + b_region
            b_of_gamma += b_g * tl.load(p_x, mask=b_ok, other=0.0).to(tl.float32)
        b_of_beta += b_g
        if grad_x is not None:
            p_gamma = gamma + b_batch * gamma_stride + b_feature
            b_gamma = tl.load(p_gamma, mask=b_in, other=0.0).to(tl.float32) + offset
            tl.store(grad_x + b_at, round_to(b_g * b_gamma[:, None], grad_x.dtype.element_ty), mask=b_ok)
    if grad_gamma is not None:
        tl.store(grad_gamma + b_row, round_to(tl.sum(b_of_gamma, 1), grad_gamma.dtype.element_ty), mask=b_in)
    if grad_beta is not None:
        tl.store(grad_beta + b_row, round_to(tl.sum(b_of_beta, 1), grad_beta.dtype.element_ty), mask=b_in)
