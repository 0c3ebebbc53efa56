"""Triton kernels of glu, forward and backward."""

from __future__ import annotations

import triton
import triton.language as tl

from velm_kernels.triton.kernels import round_to, to_int64


@triton.jit
def glu_kernel(
    x,
    gate,
    out,
    x_stride,
    gate_stride,
    rows,
    dim,
    blocks,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """out = x * sigmoid(gate) for a tile of rows and columns."""
    b_row = to_int64(tl.program_id(0) // blocks) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    b_column = (tl.program_id(0) % blocks) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    b_ok = (b_row < rows) & (b_column < dim)
    b_x = tl.load(x + b_row * x_stride + b_column, mask=b_ok, other=0.0).to(tl.float32)
    b_gate = tl.load(gate + b_row * gate_stride + b_column, mask=b_ok, other=0.0).to(tl.float32)
    b_out = b_x / (1.0 + tl.exp(-b_gate))
    tl.store(out + b_row * dim + b_column, round_to(b_out, out.dtype.element_ty), mask=b_ok)


@triton.jit
def glu_backward_kernel(
    grad,
    x,
    gate,
    grad_x,
    grad_gate,
    x_stride,
    gate_stride,
    rows,
    dim,
    blocks,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The gradients of a tile; a gradient that is not wanted is None, and x is where that of the gate is not."""
    b_row = to_int64(tl.program_id(0) // blocks) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    b_column = (tl.program_id(0) % blocks) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    b_ok = (b_row < rows) & (b_column < dim)
    b_at = b_row * dim + b_column
    b_g = tl.load(grad + b_at, mask=b_ok, other=0.0).to(tl.float32)
    b_gate = tl.load(gate + b_row * gate_stride + b_column, mask=b_ok, other=0.0).to(tl.float32)
    b_open = 1.0 / (1.0 + tl.exp(-b_gate))
    if grad_x is not None:
        tl.store(grad_x + b_at, round_to(b_g * b_open, grad_x.dtype.element_ty), mask=b_ok)
    if grad_gate is not None:
        b_x = tl.load(x + b_row * x_stride + b_column, mask=b_ok, other=0.0).to(tl.float32)
        # 1 - sigmoid(gate) is sigmoid(-gate), which does not cancel.
        b_of_gate = b_g * b_x * b_open / (1.0 + tl.exp(b_gate))
        tl.store(grad_gate + b_at, round_to(b_of_gate, grad_gate.dtype.element_ty), mask=b_ok)
