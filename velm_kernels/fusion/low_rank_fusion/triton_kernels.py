"""Triton kernels of low_rank_fusion: its value, and the gradients of the projections that are multiplied."""

from __future__ import annotations

import triton
import triton.language as tl

from velm_kernels.triton.kernels import product_add, round_to, to_int64


@triton.jit
def _projection(
    x, x_stride, factor, dim, repeat, r, b_b, rows, b_o, out, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr
):
    """A tile of [1; x] factor[r], for rows of the result of which `repeat` neighbours share one of x."""
    factor += to_int64(r) * (dim + 1) * out
    b_in_o = b_o < out
    b_one = tl.load(factor + b_o, mask=b_in_o, other=0.0).to(tl.float32)
    b_acc = tl.zeros((b_b.shape[0], b_o.shape[0]), tl.float32) + b_one[None, :]
    p_x = x + (to_int64(b_b) // repeat)[:, None] * x_stride
    b_k = tl.arange(0, BLOCK_K)
    for start in tl.range(0, dim, BLOCK_K):
        b_in_k = start + b_k < dim
        b_x = tl.load(p_x + (start + b_k)[None, :], mask=(b_b < rows)[:, None] & b_in_k[None, :], other=0.0)
        p_f = factor + to_int64(1 + start + b_k)[:, None] * out + b_o[None, :]
        b_f = tl.load(p_f, mask=b_in_k[:, None] & b_in_o[None, :], other=0.0)
        b_acc = product_add(b_x, b_f, b_acc, PRECISION)
    return b_acc


@triton.jit
def _kept(kept, repeat, r, b_b, rows, b_o, out):
    """Where a tile of the projections that backward keeps lies."""
    return kept + (to_int64(r) * (rows // repeat) + to_int64(b_b) // repeat)[:, None] * out + b_o[None, :]


@triton.jit
def _keep(kept, b_tile, repeat, r, b_b, rows, b_o, out):
    if kept is not None:
        b_ok = ((b_b < rows) & (b_b % repeat == 0))[:, None] & (b_o < out)[None, :]
        tl.store(_kept(kept, repeat, r, b_b, rows, b_o, out), b_tile, mask=b_ok)


@triton.jit
def low_rank_projection_kernel(
    x,
    factor,
    projections,
    stride,
    dim,
    rows,
    out,
    row_blocks,
    out_blocks,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A tile of the projections (rank, rows, out) of one input."""
    block = tl.program_id(0) % (row_blocks * out_blocks)
    r = tl.program_id(0) // (row_blocks * out_blocks)
    b_b = (block % row_blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    b_o = (block // row_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    b_tile = _projection(x, stride, factor, dim, 1, r, b_b, rows, b_o, out, BLOCK_K, PRECISION)
    _keep(projections, b_tile, 1, r, b_b, rows, b_o, out)


@triton.jit
def _projected(
    kept, x, x_stride, factor, dim, repeat, r, b_b, rows, b_o, out, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr
):
    """A tile of a projection: made, and kept where asked for, or without a factor what was made before."""
    if factor is None:
        b_ok = (b_b < rows)[:, None] & (b_o < out)[None, :]
        return tl.load(_kept(kept, repeat, r, b_b, rows, b_o, out), mask=b_ok, other=0.0)
    else:
        b_p = _projection(x, x_stride, factor, dim, repeat, r, b_b, rows, b_o, out, BLOCK_K, PRECISION)
        _keep(kept, b_p, repeat, r, b_b, rows, b_o, out)
        return b_p


@triton.jit
def low_rank_kernel(
    x0,
    x1,
    x2,
    x3,
    factor0,
    factor1,
    factor2,
    factor3,
    kept0,
    kept1,
    kept2,
    kept3,
    weight,
    bias,
    result,
    stride0,
    stride1,
    stride2,
    stride3,
    dim0,
    dim1,
    dim2,
    dim3,
    repeat0,
    repeat1,
    repeat2,
    repeat3,
    rows,
    out,
    rank,
    row_blocks,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A tile of the sum over ranks of the product of all projections."""
    b_b = (tl.program_id(0) % row_blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    b_o = (tl.program_id(0) // row_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    b_acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for r in tl.range(0, rank):
        b_p = _projected(kept0, x0, stride0, factor0, dim0, repeat0, r, b_b, rows, b_o, out, BLOCK_K, PRECISION)
        b_product = tl.load(weight + r).to(tl.float32) * b_p
        b_p = _projected(kept1, x1, stride1, factor1, dim1, repeat1, r, b_b, rows, b_o, out, BLOCK_K, PRECISION)
        b_product *= b_p
        if x2 is not None:
            b_p = _projected(kept2, x2, stride2, factor2, dim2, repeat2, r, b_b, rows, b_o, out, BLOCK_K, PRECISION)
            b_product *= b_p
        if x3 is not None:
            b_p = _projected(kept3, x3, stride3, factor3, dim3, repeat3, r, b_b, rows, b_o, out, BLOCK_K, PRECISION)
            b_product *= b_p
        b_acc += b_product
    if bias is not None:
        b_acc += tl.load(bias + b_o, mask=b_o < out, other=0.0).to(tl.float32)[None, :]
    p_out = result + to_int64(b_b)[:, None] * out + b_o[None, :]
    tl.store(p_out, round_to(b_acc, result.dtype.element_ty), mask=(b_b < rows)[:, None] & (b_o < out)[None, :])


@triton.jit
def _again(
    kept, x, x_stride, factor, dim, repeat, r, b_b, rows, b_o, out, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr
):
    """A tile of a projection: what was kept, or computed again."""
    if kept is not None:
        b_ok = (b_b < rows)[:, None] & (b_o < out)[None, :]
        return tl.load(_kept(kept, repeat, r, b_b, rows, b_o, out), mask=b_ok, other=0.0)
    else:
        return _projection(x, x_stride, factor, dim, repeat, r, b_b, rows, b_o, out, BLOCK_K, PRECISION)


@triton.jit
def _store(gradient, b_tile, width, column, b_b, rows, b_o, out):
    if gradient is not None:
        p = gradient + to_int64(b_b)[:, None] * width + column + b_o[None, :]
        b_ok = (b_b < rows)[:, None] & (b_o < out)[None, :]
        tl.store(p, round_to(b_tile, gradient.dtype.element_ty), mask=b_ok)


@triton.jit
def low_rank_gradients_kernel(
    grad,
    x0,
    x1,
    x2,
    x3,
    factor0,
    factor1,
    factor2,
    factor3,
    kept0,
    kept1,
    kept2,
    kept3,
    weight,
    gradient0,
    gradient1,
    gradient2,
    gradient3,
    partial,
    stride0,
    stride1,
    stride2,
    stride3,
    dim0,
    dim1,
    dim2,
    dim3,
    repeat0,
    repeat1,
    repeat2,
    repeat3,
    rows,
    out,
    first,
    ranks,
    row_blocks,
    out_blocks,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """gradient_m (rows, ranks * out) = grad weight[r] times the other projections, for ranks from `first` on; partial
    (ranks, blocks) gets the sum of grad times all projections. The gradients may be None."""
    block = tl.program_id(0) % (row_blocks * out_blocks)
    part = tl.program_id(0) // (row_blocks * out_blocks)
    r = first + part
    b_b = (block % row_blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    b_o = (block // row_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    b_ok = (b_b < rows)[:, None] & (b_o < out)[None, :]
    b_g = tl.load(grad + to_int64(b_b)[:, None] * out + b_o[None, :], mask=b_ok, other=0.0).to(tl.float32)
    scale = tl.load(weight + r).to(tl.float32)
    width, column = ranks * out, part * out
    b_0 = _again(kept0, x0, stride0, factor0, dim0, repeat0, r, b_b, rows, b_o, out, BLOCK_K, PRECISION)
    b_1 = _again(kept1, x1, stride1, factor1, dim1, repeat1, r, b_b, rows, b_o, out, BLOCK_K, PRECISION)
    b_01 = b_0 * b_1
    if x2 is None:
        b_sum = b_g * b_01
        b_g *= scale
    else:
        b_2 = _again(kept2, x2, stride2, factor2, dim2, repeat2, r, b_b, rows, b_o, out, BLOCK_K, PRECISION)
        b_first = b_g * b_01
        if x3 is None:
            b_sum = b_first * b_2
            _store(gradient2, b_first * scale, width, column, b_b, rows, b_o, out)
            b_g *= scale * b_2
        else:
            b_3 = _again(kept3, x3, stride3, factor3, dim3, repeat3, r, b_b, rows, b_o, out, BLOCK_K, PRECISION)
            b_sum = b_first * b_2 * b_3
            _store(gradient2, b_first * scale * b_3, width, column, b_b, rows, b_o, out)
            _store(gradient3, b_first * scale * b_2, width, column, b_b, rows, b_o, out)
            b_g *= scale * b_2 * b_3
    _store(gradient0, b_g * b_1, width, column, b_b, rows, b_o, out)
    _store(gradient1, b_g * b_0, width, column, b_b, rows, b_o, out)
    # At once: a reduction of what was reduced in tensor memory does not compile by Triton 3.6 and 3.7.
    tl.store(partial + tl.program_id(0), tl.sum(tl.where(b_ok, b_sum, 0.0)))
