"""Triton kernels of bilinear: its value, the gradients of its inputs and that of its weight."""

from __future__ import annotations

import triton
import triton.language as tl

from velm_kernels.triton.kernels import product_add, round_to, to_int64


@triton.jit
def _block(p, b_rows, stride, b_columns, rows, columns):
    """Rows and columns of a matrix, zeros past its end."""
    b_ok = (b_rows < rows)[:, None] & (b_columns < columns)[None, :]
    return tl.load(p + to_int64(b_rows)[:, None] * stride + b_columns[None, :], mask=b_ok, other=0.0)


@triton.jit
def bilinear_kernel(
    x,
    y,
    weight,
    partial,
    x_stride,
    y_stride,
    out_stride,
    row_stride,
    rows,
    out,
    dx,
    dy,
    row_blocks,
    out_blocks,
    steps,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """partial[s, b, k] = sum over the `steps` rows i of part s of x[b, i] (y[b] . weight[k, i])."""
    b_b = (tl.program_id(0) % row_blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    b_k = (tl.program_id(0) // row_blocks % out_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    part = tl.program_id(0) // (row_blocks * out_blocks)
    b_j = tl.arange(0, BLOCK_K)
    b_acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for i in tl.range(part * steps, tl.minimum((part + 1) * steps, dx)):
        b_t = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for start_j in tl.range(0, dy, BLOCK_K):
            b_y = _block(y, b_b, y_stride, start_j + b_j, rows, dy)
            b_w = _block(weight + to_int64(i) * row_stride, b_k, out_stride, start_j + b_j, out, dy)
            b_t = product_add(b_y, tl.trans(b_w), b_t, PRECISION)
        b_x = tl.load(x + to_int64(b_b) * x_stride + i, mask=b_b < rows, other=0.0).to(tl.float32)
        b_acc += b_x[:, None] * b_t
    b_ok = (b_b < rows)[:, None] & (b_k < out)[None, :]
    tl.store(partial + (to_int64(part) * rows + b_b)[:, None] * out + b_k[None, :], b_acc, mask=b_ok)


@triton.jit
def bilinear_inputs_kernel(
    grad,
    x,
    y,
    weight,
    partial_x,
    partial_y,
    grad_stride,
    x_stride,
    y_stride,
    out_stride,
    row_stride,
    rows,
    out,
    dx,
    dy,
    row_blocks,
    column_blocks,
    steps,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """With G = sum over k of grad[b, k] weight[k, i, j]: partial_x[block of j, b, i] = sum_j G y[b, j], and
    partial_y[s, b, j] = sum over the `steps` rows i of part s of x[b, i] G; either may be None."""
    b_b = (tl.program_id(0) % row_blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    column_block = tl.program_id(0) // row_blocks % column_blocks
    b_j = column_block * BLOCK_N + tl.arange(0, BLOCK_N)
    part = tl.program_id(0) // (row_blocks * column_blocks)
    b_k = tl.arange(0, BLOCK_K)
    b_in_b = b_b < rows
    b_ok = b_in_b[:, None] & (b_j < dy)[None, :]
    b_y = _block(y, b_b, y_stride, b_j, rows, dy).to(tl.float32)
    b_acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for i in tl.range(part * steps, tl.minimum((part + 1) * steps, dx)):
        b_g = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for start_k in tl.range(0, out, BLOCK_K):
            b_grad = _block(grad, b_b, grad_stride, start_k + b_k, rows, out)
            b_w = _block(weight + to_int64(i) * row_stride, start_k + b_k, out_stride, b_j, out, dy)
            b_g = product_add(b_grad, b_w, b_g, PRECISION)
        if partial_x is not None:
            p_x = partial_x + (to_int64(column_block) * rows + b_b) * dx + i
            tl.store(p_x, tl.sum(tl.where(b_ok, b_g * b_y, 0.0), 1), mask=b_in_b)
        if partial_y is not None:
            b_x = tl.load(x + to_int64(b_b) * x_stride + i, mask=b_in_b, other=0.0).to(tl.float32)
            b_acc += b_x[:, None] * b_g
    if partial_y is not None:
        tl.store(partial_y + (to_int64(part) * rows + b_b)[:, None] * dy + b_j[None, :], b_acc, mask=b_ok)


@triton.jit
def bilinear_weight_kernel(
    grad,
    x,
    y,
    grad_weight,
    grad_stride,
    x_stride,
    y_stride,
    rows,
    out,
    dx,
    dy,
    out_blocks,
    column_blocks,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """grad_weight[k, i, j] = sum over b of grad[b, k] (x[b, i] y[b, j]) for one i; the product in brackets is rounded
    to the operands' type, as the materialised outer product would be."""
    b_k = (tl.program_id(0) % out_blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    b_j = (tl.program_id(0) // out_blocks % column_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    i = tl.program_id(0) // (out_blocks * column_blocks)
    b_b = tl.arange(0, BLOCK_K)
    b_acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start_b in tl.range(0, rows, BLOCK_K):
        b_in_b = start_b + b_b < rows
        b_g = _block(grad, start_b + b_b, grad_stride, b_k, rows, out)
        b_x = tl.load(x + to_int64(start_b + b_b) * x_stride + i, mask=b_in_b, other=0.0).to(tl.float32)
        b_y = _block(y, start_b + b_b, y_stride, b_j, rows, dy).to(tl.float32)
        b_xy = round_to(b_x[:, None] * b_y, y.dtype.element_ty)
        b_acc = product_add(tl.trans(b_g), b_xy, b_acc, PRECISION)
    b_ok = (b_k < out)[:, None] & (b_j < dy)[None, :]
    p_out = grad_weight + (to_int64(b_k) * dx + i)[:, None] * dy + b_j[None, :]
    tl.store(p_out, round_to(b_acc, grad_weight.dtype.element_ty), mask=b_ok)
