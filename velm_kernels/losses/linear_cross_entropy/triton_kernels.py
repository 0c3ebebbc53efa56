"""Triton kernels of linear_cross_entropy: the passes over logits that a product has made."""

from __future__ import annotations

import triton
import triton.language as tl

from velm_kernels.triton.kernels import round_to, tanh, to_int64


@triton.jit
def _logits(p_z, bias, b_j, b_ok, softcap, CAPPED: tl.constexpr):
    """Products with their bias and cap."""
    b_z = tl.load(p_z + b_j, mask=b_ok, other=0.0).to(tl.float32)
    if bias is not None:
        b_z += tl.load(bias + b_j, mask=b_ok, other=0.0).to(tl.float32)
    if CAPPED:
        b_z = softcap * tanh(b_z / softcap)
    return b_z


@triton.jit
def linear_cross_entropy_sums_kernel(
    z,
    bias,
    targets,
    sums,
    z_stride,
    rows,
    columns,
    first,
    softcap,
    CAPPED: tl.constexpr,
    SMOOTHS: tl.constexpr,
    DETAILS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Takes the logits of a row (rows, columns) into its `sums` (5, rows): the largest; the sum of e^(z - largest); the
    target's; the sum of all; that of e^(z - largest) (z - largest)."""
    row = to_int64(tl.program_id(0))
    p_z, p_sums = z + row * z_stride, sums + row
    b_highest = tl.full((BLOCK,), float("-inf"), tl.float32)
    b_total, b_all, b_weighted = (
        tl.zeros((BLOCK,), tl.float32),
        tl.zeros((BLOCK,), tl.float32),
        tl.zeros((BLOCK,), tl.float32),
    )
    for start in tl.range(0, columns, BLOCK):
        b_j = start + tl.arange(0, BLOCK)
        b_ok = b_j < columns
        b_z = _logits(p_z, bias, b_j, b_ok, softcap, CAPPED)
        if SMOOTHS:
            b_all += tl.where(b_ok, b_z, 0.0)
        b_z = tl.where(b_ok, b_z, float("-inf"))
        # NaN is left to the sum of exponentials.
        b_now = tl.maximum(b_highest, b_z)
        b_off = tl.where(b_highest == float("-inf"), 0.0, b_highest - b_now)
        b_scale, b_above = tl.exp(b_off), b_z - tl.where(b_now == float("-inf"), 0.0, b_now)
        b_exp = tl.exp(b_above)
        if DETAILS:
            b_more = tl.where(b_ok, b_exp * b_above, 0.0)
            b_weighted = (b_weighted + b_total * b_off) * b_scale + b_more
        b_total = b_total * b_scale + b_exp
        b_highest = b_now
    # Over lanes, and over what came before.
    before, total = tl.load(p_sums), tl.load(p_sums + rows)
    highest = tl.maximum(tl.max(b_highest, 0), before)
    b_off = tl.where(b_highest == float("-inf"), 0.0, b_highest - highest)
    off = tl.where(before == float("-inf"), 0.0, before - highest)
    if DETAILS:
        weighted = (tl.load(p_sums + 4 * to_int64(rows)) + total * off) * tl.exp(off)
        b_weighted = (b_weighted + b_total * b_off) * tl.exp(b_off)
        tl.store(p_sums + 4 * to_int64(rows), weighted + tl.sum(b_weighted, 0))
    tl.store(p_sums, highest)
    tl.store(p_sums + rows, total * tl.exp(off) + tl.sum(b_total * tl.exp(b_off), 0))
    if SMOOTHS:
        tl.store(p_sums + 3 * to_int64(rows), tl.load(p_sums + 3 * to_int64(rows)) + tl.sum(b_all, 0))
    at = tl.load(targets + row) - first
    is_here = (at >= 0) & (at < columns)
    target = _logits(p_z, bias, at, is_here, softcap, CAPPED)
    tl.store(p_sums + 2 * to_int64(rows), target, mask=is_here)


@triton.jit
def linear_cross_entropy_gradient_kernel(
    z,
    bias,
    targets,
    weights,
    z_stride,
    rows,
    columns,
    first,
    column_blocks,
    softcap,
    CAPPED: tl.constexpr,
    DETAILS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """In place of logits their gradients, from `weights` (6, rows), see `_weights` in chunks.py; 0 in a row without a
    label."""
    row = to_int64(tl.program_id(0) // column_blocks)
    b_j = (tl.program_id(0) % column_blocks) * BLOCK + tl.arange(0, BLOCK)
    b_ok = b_j < columns
    p_z, p_weights = z + row * z_stride, weights + row
    target = tl.load(targets + row)
    b_z = _logits(p_z, bias, b_j, b_ok, softcap, CAPPED)
    b_log = b_z - tl.load(p_weights + 4 * to_int64(rows))
    b_factor = tl.load(p_weights)
    if DETAILS:
        b_factor -= tl.load(p_weights + 3 * to_int64(rows)) * (b_log + tl.load(p_weights + 5 * to_int64(rows)))
    b_gradient = tl.exp(b_log) * b_factor - tl.load(p_weights + 2 * to_int64(rows))
    b_gradient -= tl.where(b_j == target - first, tl.load(p_weights + rows), 0.0)
    if CAPPED:
        b_share = b_z / softcap
        b_gradient *= 1.0 - b_share * b_share
    # Selected: a row without a label may hold anything.
    b_gradient = tl.where(target < 0, 0.0, b_gradient)
    tl.store(p_z + b_j, round_to(b_gradient, z.dtype.element_ty), mask=b_ok)
