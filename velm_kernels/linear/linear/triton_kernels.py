"""Triton kernels of linear: what comes after the product of forward, and before those of backward."""

from __future__ import annotations

import triton
import triton.language as tl

from velm_kernels.triton.kernels import round_to, tanh, to_int64


@triton.jit
def _sigmoid(b_x):
    return 1.0 / (1.0 + tl.exp2(b_x * -1.4426950408889634))


@triton.jit
def _activate(b_z, ACTIVATION: tl.constexpr):
    if ACTIVATION == "relu":
        # Not a maximum: NaN stays NaN.
        return tl.where(b_z <= 0.0, 0.0, b_z)
    elif ACTIVATION == "gelu":
        return 0.5 * b_z * (1.0 + tl.erf(b_z * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        return 0.5 * b_z * (1.0 + tanh(0.7978845608028654 * (b_z + 0.044715 * b_z * b_z * b_z)))
    elif ACTIVATION == "quick_gelu":
        return b_z * _sigmoid(1.702 * b_z)
    elif ACTIVATION == "silu":
        return b_z * _sigmoid(b_z)
    elif ACTIVATION == "tanh":
        return tanh(b_z)
    else:
        return b_z


@triton.jit
def _slope(b_saved, ACTIVATION: tl.constexpr, FROM_VALUE: tl.constexpr):
    """Derivative of the activation, but relu's, from its value or else from z."""
    if ACTIVATION == "tanh":
        b_tanh = b_saved if FROM_VALUE else tanh(b_saved)
        return 1.0 - b_tanh * b_tanh
    elif ACTIVATION == "gelu":
        b_density = tl.exp2(b_saved * b_saved * (-0.5 * 1.4426950408889634)) * 0.3989422804014327
        return 0.5 * (1.0 + tl.erf(b_saved * 0.7071067811865476)) + b_saved * b_density
    elif ACTIVATION == "gelu_tanh":
        b_tanh = tanh(0.7978845608028654 * (b_saved + 0.044715 * b_saved * b_saved * b_saved))
        b_inner = 0.7978845608028654 * (1.0 + 0.134145 * b_saved * b_saved)
        return 0.5 * (1.0 + b_tanh) + 0.5 * b_saved * (1.0 - b_tanh * b_tanh) * b_inner
    elif ACTIVATION == "quick_gelu":
        b_sigmoid = _sigmoid(1.702 * b_saved)
        return b_sigmoid * (1.0 + 1.702 * b_saved * (1.0 - b_sigmoid))
    else:
        b_sigmoid = _sigmoid(b_saved)
        return b_sigmoid * (1.0 + b_saved * (1.0 - b_sigmoid))


@triton.jit
def linear_epilogue_kernel(
    z,
    residual,
    out,
    value,
    residual_stride,
    rows,
    features,
    column_blocks,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """out = activation(z) + residual, and the activation's value for backward; residual and value may be None. out may
    be z."""
    b_i = (tl.program_id(0) // column_blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    b_j = (tl.program_id(0) % column_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    b_ok = (b_i < rows)[:, None] & (b_j < features)[None, :]
    b_at = to_int64(b_i)[:, None] * features + b_j[None, :]
    b_out = _activate(tl.load(z + b_at, mask=b_ok, other=0.0).to(tl.float32), ACTIVATION)
    if value is not None:
        tl.store(value + b_at, round_to(b_out, value.dtype.element_ty), mask=b_ok)
    if residual is not None:
        p_residual = residual + to_int64(b_i)[:, None] * residual_stride + b_j[None, :]
        b_out += tl.load(p_residual, mask=b_ok, other=0.0).to(tl.float32)
    tl.store(out + b_at, round_to(b_out, out.dtype.element_ty), mask=b_ok)


@triton.jit
def linear_grad_kernel(
    grad,
    saved,
    grad_z,
    partial_bias,
    grad_stride,
    rows,
    features,
    column_blocks,
    steps,
    ACTIVATION: tl.constexpr,
    FROM_VALUE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """grad_z = grad * activation'(z), and its sums over `steps` blocks of rows in `partial_bias` (programs, features);
    either may be None."""
    row_program = tl.program_id(0) // column_blocks
    b_j = (tl.program_id(0) % column_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    b_in_n = b_j < features
    b_sum = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in tl.range(0, steps):
        b_i = (row_program * steps + step) * BLOCK_M + tl.arange(0, BLOCK_M)
        b_ok = (b_i < rows)[:, None] & b_in_n[None, :]
        b_g = tl.load(grad + to_int64(b_i)[:, None] * grad_stride + b_j[None, :], mask=b_ok, other=0.0).to(tl.float32)
        b_at = to_int64(b_i)[:, None] * features + b_j[None, :]
        if saved is not None:
            b_saved = tl.load(saved + b_at, mask=b_ok, other=0.0).to(tl.float32)
            if ACTIVATION == "relu":
                # Selected: 0 times infinity is NaN.
                b_g = tl.where(b_saved <= 0.0, 0.0, b_g)
            else:
                b_g = b_g * _slope(b_saved, ACTIVATION, FROM_VALUE)
        if grad_z is not None:
            tl.store(grad_z + b_at, round_to(b_g, grad_z.dtype.element_ty), mask=b_ok)
        b_sum += b_g
    if partial_bias is not None:
        tl.store(partial_bias + to_int64(row_program) * features + b_j, tl.sum(b_sum, 0), mask=b_in_n)
