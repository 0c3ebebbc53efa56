"""Triton kernels of gated_residual, forward and backward."""

from __future__ import annotations

import triton
import triton.language as tl

from velm_kernels.triton.kernels import LOG2E, round_to, tanh, to_int64


@triton.jit
def gated_residual_kernel(
    residual,
    x,
    gate,
    row_mask,
    out,
    residual_stride,
    x_stride,
    rows,
    dim,
    dim_blocks,
    GATE_IS_ROW: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """out = residual + tanh(gate) * x; rows that `row_mask` switches off are those of `residual`."""
    b_row = (tl.program_id(0) // dim_blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    b_column = (tl.program_id(0) % dim_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    b_live = b_row < rows
    b_ok = b_live[:, None] & (b_column < dim)[None, :]
    if row_mask is not None:
        b_live = tl.load(row_mask + b_row, mask=b_live, other=0) != 0
    b_read = b_ok & b_live[:, None]
    if GATE_IS_ROW:
        b_gate = tl.load(gate + b_column, mask=b_column < dim, other=0.0).to(tl.float32)
    else:
        b_gate = tl.load(gate).to(tl.float32) + tl.zeros((BLOCK_N,), tl.float32)
    b_r = tl.load(residual + to_int64(b_row)[:, None] * residual_stride + b_column[None, :], mask=b_ok, other=0.0)
    b_x = tl.load(x + to_int64(b_row)[:, None] * x_stride + b_column[None, :], mask=b_read, other=0.0)
    # Selected, not multiplied by 0: an infinite gate must not reach a row that is switched off.
    b_branch = tl.where(b_read, tanh(b_gate)[None, :] * b_x.to(tl.float32), 0.0)
    b_out = b_r.to(tl.float32) + b_branch
    tl.store(out + to_int64(b_row)[:, None] * dim + b_column[None, :], round_to(b_out, out.dtype.element_ty), mask=b_ok)


@triton.jit
def gated_residual_backward_kernel(
    grad,
    x,
    gate,
    row_mask,
    grad_x,
    partial_gate,
    x_stride,
    rows,
    dim,
    dim_blocks,
    steps,
    GATE_IS_ROW: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """grad_x = tanh(gate) * grad, and partial sums of grad_gate = (1 - tanh(gate)^2) * sum over rows of grad * x.

    A program takes `steps` blocks of rows of one block of columns, in order. `partial_gate` is (row programs, dim) for
    a gate with one number per column, else (programs,)."""
    row_program = tl.program_id(0) // dim_blocks
    b_column = (tl.program_id(0) % dim_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    b_in = b_column < dim
    if GATE_IS_ROW:
        b_gate = tl.load(gate + b_column, mask=b_in, other=0.0).to(tl.float32)
    else:
        b_gate = tl.load(gate).to(tl.float32) + tl.zeros((BLOCK_N,), tl.float32)
    b_tanh = tanh(b_gate)
    b_sum = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in tl.range(0, steps):
        b_row = (row_program * steps + step) * BLOCK_M + tl.arange(0, BLOCK_M)
        b_live = b_row < rows
        b_ok = b_live[:, None] & b_in[None, :]
        if row_mask is not None:
            b_live = tl.load(row_mask + b_row, mask=b_live, other=0) != 0
        b_read = b_ok & b_live[:, None]
        b_at = to_int64(b_row)[:, None] * dim + b_column[None, :]
        b_grad = tl.load(grad + b_at, mask=b_read, other=0.0).to(tl.float32)
        if grad_x is not None:
            b_dx = tl.where(b_read, b_tanh[None, :] * b_grad, 0.0)
            tl.store(grad_x + b_at, round_to(b_dx, grad_x.dtype.element_ty), mask=b_ok)
        if partial_gate is not None:
            b_x = tl.load(x + to_int64(b_row)[:, None] * x_stride + b_column[None, :], mask=b_read, other=0.0)
            b_sum += b_grad * b_x.to(tl.float32)
    if partial_gate is not None:
        # 1 - tanh^2 from the argument: the difference cancels for a wide open gate.
        b_e = tl.exp2(-tl.abs(b_gate) * (2.0 * LOG2E))
        b_total = tl.sum(b_sum, 0) * (4.0 * b_e / ((1.0 + b_e) * (1.0 + b_e)))
        if GATE_IS_ROW:
            tl.store(partial_gate + to_int64(row_program) * dim + b_column, b_total, mask=b_in)
        else:
            tl.store(partial_gate + tl.program_id(0), tl.sum(b_total, 0))
