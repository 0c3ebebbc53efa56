"""Triton kernels of factorized_pool, forward and backward."""

from __future__ import annotations

import triton
import triton.language as tl

from velm_kernels.triton.kernels import round_to, to_int64

LARGEST = tl.constexpr(float.fromhex("0x1.fffffep127"))


@triton.jit
def _products(p_a, p_b, seed, drop_below, keep_scale, b_row, b_c, b_ok):
    """a, b, and the factor of their product that dropout leaves, for columns b_c of rows b_row."""
    b_a = tl.load(p_a + b_c, mask=b_ok, other=0.0).to(tl.float32)
    b_b = tl.load(p_b + b_c, mask=b_ok, other=0.0).to(tl.float32)
    b_keep = b_ok
    if seed is not None:
        # Word c % 64 // 16 of counter c // 64 * 16 + c % 16.
        b_zero = (b_row * 0).to(tl.int32) + b_c * 0
        b_c0 = (b_c // 64) * 16 + b_c % 16 + b_zero
        b_c1 = b_row.to(tl.int32) + b_zero
        b_c2 = (b_row >> 32).to(tl.int32) + b_zero
        b_w0, b_w1, b_w2, b_w3 = tl.philox(tl.load(seed), b_c0, b_c1, b_c2, b_zero)
        b_which = b_c % 64 // 16 + b_zero
        b_word = tl.where(b_which == 0, b_w0, tl.where(b_which == 1, b_w1, tl.where(b_which == 2, b_w2, b_w3)))
        b_keep = b_ok & (b_word >= tl.cast(drop_below, tl.uint32))
    return b_a, b_b, b_keep


@triton.jit
def _sums(
    p_a,
    p_b,
    seed,
    drop_below,
    keep_scale,
    b_row,
    b_o,
    b_ok,
    dim,
    factor,
    INNER: tl.constexpr,
):
    """The sums over the factor for outputs b_o."""
    b_z = tl.zeros(b_ok.shape, tl.float32)
    for f in tl.range(0, factor):
        if INNER:
            b_c = b_o * factor + f
        else:
            b_c = b_o + f * dim
        b_a, b_b, b_keep = _products(p_a, p_b, seed, drop_below, keep_scale, b_row, b_c, b_ok)
        # Selected, not multiplied by 0: what is dropped may be infinite.
        b_z += tl.where(b_keep, b_a * b_b * keep_scale, 0.0)
    return b_z


@triton.jit
def _root(b_z, POWER: tl.constexpr):
    if POWER:
        return tl.where(b_z < 0.0, -tl.sqrt_rn(tl.abs(b_z)), tl.sqrt_rn(tl.abs(b_z)))
    else:
        return b_z


@triton.jit
def _rows(x, batch_stride, region_stride, regions, b_row):
    return x + to_int64(b_row // regions) * batch_stride + to_int64(b_row % regions) * region_stride


@triton.jit
def factorized_pool_kernel(
    a,
    b,
    out,
    seed,
    drop_below,
    keep_scale,
    a_batch_stride,
    a_region_stride,
    b_batch_stride,
    b_region_stride,
    rows,
    regions,
    dim,
    factor,
    INNER: tl.constexpr,
    POWER: tl.constexpr,
    L2: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """out = normalize(root(sums of dropout(a * b))) for BLOCK_M rows; under the norm the sums are computed twice."""
    b_row = to_int64(tl.program_id(0)) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    b_in = b_row < rows
    b_row = tl.where(b_in, b_row, 0)
    p_a = _rows(a, a_batch_stride, a_region_stride, regions, b_row)
    p_b = _rows(b, b_batch_stride, b_region_stride, regions, b_row)
    b_scale = tl.full((BLOCK_M, 1), 1.0, tl.float32)
    if L2:
        b_sum = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for start in tl.range(0, dim, BLOCK_N):
            b_o = start + tl.arange(0, BLOCK_N)[None, :]
            b_ok = b_in & (b_o < dim)
            b_z = _sums(p_a, p_b, seed, drop_below, keep_scale, b_row, b_o, b_ok, dim, factor, INNER)
            b_sum += tl.abs(b_z) if POWER else b_z * b_z
        b_norm = tl.sqrt_rn(tl.sum(b_sum, 1)[:, None])
        b_scale = 1.0 / tl.where(b_norm < 1e-12, 1e-12, b_norm)
    for start in tl.range(0, dim, BLOCK_N):
        b_o = start + tl.arange(0, BLOCK_N)[None, :]
        b_ok = b_in & (b_o < dim)
        b_z = _sums(p_a, p_b, seed, drop_below, keep_scale, b_row, b_o, b_ok, dim, factor, INNER)
        b_out = _root(b_z, POWER) * b_scale
        tl.store(out + b_row * dim + b_o, round_to(b_out, out.dtype.element_ty), mask=b_ok)


@triton.jit
def factorized_pool_backward_kernel(
    grad,
    a,
    b,
    grad_a,
    grad_b,
    seed,
    drop_below,
    keep_scale,
    a_batch_stride,
    a_region_stride,
    b_batch_stride,
    b_region_stride,
    rows,
    regions,
    dim,
    factor,
    INNER: tl.constexpr,
    POWER: tl.constexpr,
    L2: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """grad_a and grad_b, either of which may be None, with the sums computed again."""
    b_row = to_int64(tl.program_id(0)) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    b_in = b_row < rows
    b_row = tl.where(b_in, b_row, 0)
    p_a = _rows(a, a_batch_stride, a_region_stride, regions, b_row)
    p_b = _rows(b, b_batch_stride, b_region_stride, regions, b_row)
    b_norm = tl.full((BLOCK_M, 1), 1.0, tl.float32)
    b_scale = tl.full((BLOCK_M, 1), 1.0, tl.float32)
    b_along = tl.zeros((BLOCK_M, 1), tl.float32)
    if L2:
        b_sum = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        b_dot = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for start in tl.range(0, dim, BLOCK_N):
            b_o = start + tl.arange(0, BLOCK_N)[None, :]
            b_ok = b_in & (b_o < dim)
            b_z = _sums(p_a, p_b, seed, drop_below, keep_scale, b_row, b_o, b_ok, dim, factor, INNER)
            b_g = tl.load(grad + b_row * dim + b_o, mask=b_ok, other=0.0).to(tl.float32)
            b_sum += tl.abs(b_z) if POWER else b_z * b_z
            b_dot += _root(b_z, POWER) * b_g
        b_norm = tl.sqrt_rn(tl.sum(b_sum, 1)[:, None])
        b_scale = 1.0 / tl.where(b_norm < 1e-12, 1e-12, b_norm)
        b_along = tl.where(b_norm <= 1e-12, 0.0, tl.sum(b_dot, 1)[:, None] * b_scale * b_scale)
    for start in tl.range(0, dim, BLOCK_N):
        b_o = start + tl.arange(0, BLOCK_N)[None, :]
        b_ok = b_in & (b_o < dim)
        b_z = _sums(p_a, p_b, seed, drop_below, keep_scale, b_row, b_o, b_ok, dim, factor, INNER)
        b_root = _root(b_z, POWER)
        b_given = tl.load(grad + b_row * dim + b_o, mask=b_ok, other=0.0).to(tl.float32)
        b_g = b_given
        if L2:
            # Nothing is read of a row of zeros.
            b_g = tl.where(b_norm == 0.0, 0.0, (b_given - b_root * b_along) * b_scale)
        if POWER:
            b_g = tl.where(b_z == 0.0, 0.0, b_g / tl.where(b_z == 0.0, 1.0, 2.0 * tl.abs(b_root)))
        # What comes in infinite stays so, and NaN, which compares false.
        b_limit = tl.where((tl.abs(b_given) < float("inf")) & (tl.abs(b_along) < float("inf")), LARGEST, float("inf"))
        b_g = tl.where(b_g > b_limit, b_limit, tl.where(b_g < -b_limit, -b_limit, b_g))
        for f in tl.range(0, factor):
            if INNER:
                b_c = b_o * factor + f
            else:
                b_c = b_o + f * dim
            b_a, b_b, b_keep = _products(p_a, p_b, seed, drop_below, keep_scale, b_row, b_c, b_ok)
            b_at = b_row * (dim * factor) + b_c
            if grad_a is not None:
                b_d = tl.where(b_keep, b_g * b_b * keep_scale, 0.0)
                tl.store(grad_a + b_at, round_to(b_d, grad_a.dtype.element_ty), mask=b_ok)
            if grad_b is not None:
                b_d = tl.where(b_keep, b_g * b_a * keep_scale, 0.0)
                tl.store(grad_b + b_at, round_to(b_d, grad_b.dtype.element_ty), mask=b_ok)
