"""Triton kernels of the RMS norm of query and key over head_dim (Zhang and Sennrich, 2019)."""

from __future__ import annotations

import triton
import triton.language as tl

from velm_kernels.triton.kernels import round_to, to_int64


@triton.jit
def _row_pointers(x, strides, b_row, heads, length):
    b = b_row // (heads * length)
    b_head = (b_row // length) % heads
    return x + to_int64(b) * strides.batch + to_int64(b_head) * strides.head + to_int64(b_row % length) * strides.row


@triton.jit
def rms_norm_kernel(
    x,
    weight,
    y,
    x_strides,
    y_strides,
    heads,
    length,
    rows,
    eps,
    DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """y = weight * x / sqrt(mean(x^2) + eps) for rows (batch, head, position)."""
    b_row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    b_d = tl.arange(0, BLOCK_D)
    b_ok = (b_row < rows)[:, None] & (b_d < DIM)[None, :]
    b_x = tl.load(_row_pointers(x, x_strides, b_row, heads, length)[:, None] + b_d[None, :], mask=b_ok, other=0.0).to(
        tl.float32
    )
    b_w = tl.load(weight + b_d, mask=b_d < DIM, other=0.0).to(tl.float32)
    b_inverse = 1.0 / tl.sqrt(tl.sum(b_x * b_x, 1) / DIM + eps)
    b_y = b_x * b_inverse[:, None] * b_w[None, :]
    tl.store(
        _row_pointers(y, y_strides, b_row, heads, length)[:, None] + b_d[None, :],
        round_to(b_y, y.dtype.element_ty),
        mask=b_ok,
    )


@triton.jit
def rms_norm_backward_kernel(
    x,
    weight,
    grad_y,
    grad_x,
    partial_weight,
    x_strides,
    grad_y_strides,
    grad_x_strides,
    heads,
    length,
    rows,
    eps,
    steps,
    DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """grad_x of the norm, and sums of the weight's gradient over `steps` blocks of rows per program in `partial_weight`
    (programs, DIM).

    With n = x / rms: grad_x = (w * grad_y - n * mean(w * grad_y * n)) / rms, grad_w = sum over rows of grad_y * n."""
    b_d = tl.arange(0, BLOCK_D)
    b_w = tl.load(weight + b_d, mask=b_d < DIM, other=0.0).to(tl.float32)
    b_dw = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for step in tl.range(0, steps):
        b_row = (tl.program_id(0) * steps + step) * BLOCK_M + tl.arange(0, BLOCK_M)
        b_in = b_row < rows
        b_ok = b_in[:, None] & (b_d < DIM)[None, :]
        b_row = tl.where(b_in, b_row, 0)
        b_dy = tl.load(
            _row_pointers(grad_y, grad_y_strides, b_row, heads, length)[:, None] + b_d[None, :], mask=b_ok, other=0.0
        ).to(tl.float32)
        # A row whose gradient is all zero was not attended to: it is not read, as it may be NaN, and weights may be.
        b_live = tl.max((b_dy != 0.0).to(tl.int32), 1) > 0
        b_x = tl.load(
            _row_pointers(x, x_strides, b_row, heads, length)[:, None] + b_d[None, :],
            mask=b_ok & b_live[:, None],
            other=0.0,
        ).to(tl.float32)
        b_inverse = 1.0 / tl.sqrt(tl.sum(b_x * b_x, 1) / DIM + eps)
        b_inverse = tl.where(b_live, b_inverse, 0.0)
        b_n = b_x * b_inverse[:, None]
        b_g = tl.where(b_live[:, None], b_dy * b_w[None, :], 0.0)
        b_dx = (b_g - b_n * (tl.sum(b_g * b_n, 1) / DIM)[:, None]) * b_inverse[:, None]
        b_dw += b_dy * b_n
        if grad_x is not None:
            tl.store(
                _row_pointers(grad_x, grad_x_strides, b_row, heads, length)[:, None] + b_d[None, :],
                round_to(b_dx, grad_x.dtype.element_ty),
                mask=b_ok,
            )
    if partial_weight is not None:
        tl.store(partial_weight + to_int64(tl.program_id(0)) * DIM + b_d, tl.sum(b_dw, 0), mask=b_d < DIM)
