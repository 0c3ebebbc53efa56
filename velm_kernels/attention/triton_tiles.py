"""What the Triton attention kernels share: which rows and keys a tile holds, and its scores.

Blocks are written `b_...`, pointers `p_...`. A tile is addressed by query indices and key indices that were already
expanded to two dimensions, so that the same helpers serve tiles of queries x keys `[BM, BN]` and of keys x queries
`[BN, BM]`.

Scores live in the base-2 domain (multiplied by log2(e)), so that every exponential is one `exp2`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# Larger than every index, small enough that adding a block size cannot overflow int32.
FAR = tl.constexpr(1 << 30)


class Strides(NamedTuple):
    """Strides in elements; the innermost one is 1. `batch` is 0 for packed sequences."""

    batch: Any
    head: Any
    row: Any


class MatrixStrides(NamedTuple):
    """Strides in elements of what broadcasts to (batch, heads, queries, keys): 0 where it broadcasts."""

    batch: Any
    head: Any
    row: Any
    column: Any


class Masks(NamedTuple):
    """Everything that restricts or shifts scores. Absent parts are None and cost nothing: a variant is compiled without
    them."""

    lengths: Any
    range_start: Any
    range_stop: Any
    key_mask: Any
    mask: Any
    mask_strides: Any
    bias: Any
    bias_strides: Any
    seed: Any
    # A word of the generator below this drops its element.
    drop_below: Any
    keep_scale: Any
    # 0, but for the second direction of bidirectional attention.
    direction: Any = 0


class Sizes(NamedTuple):
    """Numbers of heads, of query heads that share one key head, of queries and of keys. For packed sequences the last
    two are totals, and the pointers to the cumulative lengths are not None."""

    heads: Any
    group: Any
    queries: Any
    keys: Any
    cu_seqlens_q: Any
    cu_seqlens_k: Any


class Scaling(NamedTuple):
    """Without a softcap: `product` = scale * log2(e), the other two None. With one: `product` = scale / softcap,
    `cap` = softcap * log2(e), so that s = cap * tanh(product * q.k)."""

    product: Any
    cap: Any


@triton.jit
def wide(x):
    return tl.cast(x, tl.int64)


@triton.jit
def round_to(b_x, dtype: tl.constexpr):
    """float32 to `dtype`, nearest even."""
    if INTERPRETED and dtype == tl.bfloat16:
        # The interpreter's own conversion rounds ties up and loses the carry into the exponent.
        b_bits = b_x.to(tl.float32).to(tl.uint32, bitcast=True)
        b_up = b_bits + (((b_bits >> 16) & 1) + 0x7FFF)
        b_up = tl.where(b_x != b_x, b_bits | 0x400000, b_up)
        return (b_up >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return b_x.to(dtype)


@triton.jit
def product(b_a, b_b, PRECISION: tl.constexpr):
    """Matrix product with float32 accumulation."""
    if INTERPRETED:
        # The interpreter multiplies the bit patterns of bfloat16.
        return tl.dot(b_a.to(tl.float32), b_b.to(tl.float32), input_precision="ieee")
    else:
        return tl.dot(b_a, b_b, input_precision=PRECISION)


@triton.jit
def product_add(b_a, b_b, b_acc, PRECISION: tl.constexpr):
    """`b_acc` plus a matrix product."""
    if INTERPRETED:
        return tl.dot(b_a.to(tl.float32), b_b.to(tl.float32), b_acc, input_precision="ieee")
    else:
        return tl.dot(b_a, b_b, b_acc, input_precision=PRECISION)


@triton.jit
def load_rows(
    p_x, b_row, stride_row, b_ok, WIDTH: tl.constexpr, BLOCK: tl.constexpr, CHECKED: tl.constexpr, WIDE: tl.constexpr
):
    """Rows `b_row` of a row-major matrix of `WIDTH` columns, zero-padded to `BLOCK`; where `CHECKED`, rows that are not
    `b_ok` are not read and come back as zeros. -> [rows, BLOCK]"""
    b_column = tl.arange(0, BLOCK)
    if WIDE:
        b_row = b_row.to(tl.int64)
    p_tile = p_x + b_row[:, None] * stride_row + b_column[None, :]
    if CHECKED:
        if WIDTH == BLOCK:
            return tl.load(p_tile, mask=b_ok[:, None], other=0.0)
        else:
            return tl.load(p_tile, mask=b_ok[:, None] & (b_column < WIDTH)[None, :], other=0.0)
    else:
        if WIDTH == BLOCK:
            return tl.load(p_tile)
        else:
            return tl.load(p_tile, mask=(b_column < WIDTH)[None, :], other=0.0)


@triton.jit
def store_rows(p_x, b_row, stride_row, b_ok, b_x, WIDTH: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    """The inverse of `load_rows`, rounding to the type of the destination."""
    b_column = tl.arange(0, BLOCK)
    if WIDE:
        b_row = b_row.to(tl.int64)
    p_tile = p_x + b_row[:, None] * stride_row + b_column[None, :]
    b_ok = b_ok[:, None]
    if WIDTH != BLOCK:
        b_ok = b_ok & (b_column < WIDTH)[None, :]
    tl.store(p_tile, round_to(b_x, p_x.dtype.element_ty), mask=b_ok)


@triton.jit
def sequence(cu_seqlens, b, total):
    """Start and length of packed sequence `b`, kept inside the tensor whatever `cu_seqlens` says; (0, total) where
    nothing is packed."""
    if cu_seqlens is not None:
        start = tl.minimum(tl.maximum(tl.load(cu_seqlens + b), 0), total)
        stop = tl.minimum(tl.load(cu_seqlens + b + 1), total)
        return start, tl.maximum(stop - start, 0)
    else:
        return 0, total


@triton.jit
def row_bounds(masks, b, start_q, queries, keys, b_m, CAUSAL: tl.constexpr):
    """Keys [lo, hi) that each query row may see by its length, range and causality; (0, 0) for a row that sees none and
    for a row past the end. `start_q` counts the rows of the range arrays in front of this batch entry or sequence."""
    b_lo = tl.zeros_like(b_m)
    b_hi = tl.where(b_m < queries, keys, 0)
    if masks.lengths is not None:
        b_hi = tl.minimum(b_hi, tl.maximum(tl.load(masks.lengths + b), 0))
    if CAUSAL:
        b_hi = tl.minimum(b_hi, b_m + 1)
    if masks.range_start is not None:
        b_in = b_m < queries
        b_lo = tl.maximum(tl.load(masks.range_start + start_q + b_m, mask=b_in, other=0), 0)
        b_hi = tl.minimum(b_hi, tl.load(masks.range_stop + start_q + b_m, mask=b_in, other=0))
    b_some = b_lo < b_hi
    return tl.where(b_some, b_lo, 0), tl.where(b_some, b_hi, 0)


@triton.jit
def block_bounds(b_lo, b_hi, b_in):
    """-> (lo, hi, full_lo, full_hi): a block of rows needs keys [lo, hi) only, and all its rows see all of
    [full_lo, full_hi), which may be empty. Rows past the end (not `b_in`) do not count."""
    b_some = b_lo < b_hi
    lo = tl.min(tl.where(b_some, b_lo, FAR), axis=0)
    hi = tl.max(b_hi, axis=0)
    full_lo = tl.max(b_lo, axis=0)
    full_hi = tl.min(tl.where(b_in, b_hi, FAR), axis=0)
    return tl.minimum(lo, hi), hi, full_lo, full_hi


@triton.jit
def tanh(b_x):
    """Relative error of a few units in the last place; the exponential alone would lose small arguments."""
    b_z = b_x * b_x
    b_series = -5.70498872745e-3 * b_z + 2.06390887954e-2
    b_series = b_series * b_z - 5.37397155531e-2
    b_series = b_series * b_z + 1.33314422036e-1
    b_series = b_series * b_z - 3.33332819422e-1
    b_series = b_series * b_z * b_x + b_x
    b_e = tl.exp2(b_x * (2.0 * LOG2E))
    return tl.where(tl.abs(b_x) < 0.625, b_series, 1.0 - 2.0 / (b_e + 1.0))


@triton.jit
def kept(seed, drop_below, direction, b_head_index, b_m, start_n, BLOCK_N: tl.constexpr, KEYS_FIRST: tl.constexpr):
    """Which elements dropout keeps: Philox4x32-10 with the seed as key and (query, key // 4, batch * heads + head,
    direction) as counter; the four words serve four neighbouring keys. `b_m` and `b_head_index` are expanded like the
    tile, which starts at key `start_n`, a multiple of 4. -> [BM, BN], or [BN, BM] where KEYS_FIRST"""
    b_group = (start_n // 4) + tl.arange(0, BLOCK_N // 4)
    if KEYS_FIRST:
        b_group = b_group[:, None]
    else:
        b_group = b_group[None, :]
    seed = tl.load(seed)
    # Every word depends on both indices only after some rounds: start from full tiles.
    b_c0 = b_m + b_group * 0
    b_c1 = b_group + b_m * 0
    b_c2 = b_head_index + b_c0 * 0
    b_0, b_1, b_2, b_3 = tl.philox(seed, b_c0, b_c1, b_c2, b_c0 * 0 + direction)
    b_words = tl.join(tl.join(b_0, b_2), tl.join(b_1, b_3))
    if KEYS_FIRST:
        b_words = tl.permute(b_words, (0, 2, 3, 1))
        b_words = tl.reshape(b_words, (BLOCK_N, b_m.shape[1]))
    else:
        b_words = tl.reshape(b_words, (b_m.shape[0], BLOCK_N))
    return b_words >= tl.cast(drop_below, tl.uint32)


@triton.jit
def matrix_pointers(x, strides, b, b_head, b_m, b_n, WIDE: tl.constexpr):
    """Where a tile of (batch, heads, queries, keys) stands; offsets within one head are 32-bit unless `WIDE`."""
    if WIDE:
        b_m = b_m.to(tl.int64)
        b_n = b_n.to(tl.int64)
    return x + wide(b) * strides.batch + wide(b_head) * strides.head + (b_m * strides.row + b_n * strides.column)


@triton.jit
def scores(
    masks,
    scaling,
    b_qk,
    b_key_ok,
    b,
    b_head,
    b_m,
    b_n,
    b_lo,
    b_hi,
    keys,
    queries,
    MASKED: tl.constexpr,
    KEYS_FIRST: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Scores in the base-2 domain of a tile of products `b_qk`: -inf where not visible.

    -> (scores, visible or None, tanh or None). Inputs are expanded to the tile's two dimensions; `b_head` may be a
    scalar. `b_key_ok` [BN] is what `key_rows_ok` says of the keys; KEYS_FIRST: the tile is [BN, BM]. A tile that is not
    `MASKED` lies inside [lo, hi) of all of its rows."""
    b_tanh: tl.constexpr = None
    if scaling.cap is not None:
        b_tanh = tanh(b_qk * scaling.product)
        b_s = b_tanh * scaling.cap
    else:
        b_s = b_qk * scaling.product

    b_visible: tl.constexpr = None
    if MASKED:
        b_visible = b_n < b_hi
        if masks.range_start is not None:
            b_visible = b_visible & (b_n >= b_lo)
    b_inside = (b_m < queries) & (b_n < keys)
    if masks.key_mask is not None:
        if KEYS_FIRST:
            b_open = b_key_ok[:, None]
        else:
            b_open = b_key_ok[None, :]
        b_visible = b_open if b_visible is None else b_visible & b_open
    if masks.mask is not None:
        p_mask = matrix_pointers(masks.mask, masks.mask_strides, b, b_head, b_m, b_n, WIDE)
        b_ok = tl.load(p_mask, mask=b_inside, other=0) != 0
        b_visible = b_ok if b_visible is None else b_visible & b_ok
    if masks.bias is not None:
        p_bias = matrix_pointers(masks.bias, masks.bias_strides, b, b_head, b_m, b_n, WIDE)
        # Rows past the end see nothing, or else they would count as readers of a key.
        b_bias = tl.load(p_bias, mask=b_inside, other=-float("inf")).to(tl.float32)
        b_s += b_bias * LOG2E
        b_ok = b_bias != -float("inf")
        b_visible = b_ok if b_visible is None else b_visible & b_ok
    if b_visible is not None:
        b_s = tl.where(b_visible, b_s, -float("inf"))
    return b_s, b_visible, b_tanh


@triton.jit
def key_rows_ok(masks, b, b_n, lo, hi, keys, MASKED: tl.constexpr):
    """Which keys of a block may be read at all. -> [BN] or None when all may"""
    b_ok: tl.constexpr = None
    if MASKED:
        b_ok = (b_n >= lo) & (b_n < hi)
    if masks.key_mask is not None:
        b_open = tl.load(masks.key_mask + wide(b) * keys + b_n, mask=b_n < keys, other=0) != 0
        b_ok = b_open if b_ok is None else b_ok & b_open
    return b_ok


@triton.jit
def base2(b_lse):
    """logsumexp in the base-2 domain, such that exp2(s - it) is 0 in an empty row, where s = -inf."""
    return tl.where(b_lse == -float("inf"), float("inf"), b_lse * LOG2E)


@triton.jit
def grad_scores(b_p, b_dp, b_delta, b_visible, b_tanh, b_keep, keep_scale):
    """With dp = grad_out . value and delta = sum(grad_out * out) - grad_logsumexp the gradient of a score is
    p * (dp - delta) (Dao et al., 2022).

    -> (gradient of the scores after softcap and bias, gradient of the products), both without the scale."""
    if b_keep is not None:
        b_dp = tl.where(b_keep, b_dp * keep_scale, 0.0)
    b_ds = b_p * (b_dp - b_delta)
    if b_visible is not None:
        b_ds = tl.where(b_visible, b_ds, 0.0)
    if b_tanh is not None:
        b_dqk = b_ds * (1.0 - b_tanh * b_tanh)
        if b_visible is not None:
            b_dqk = tl.where(b_visible, b_dqk, 0.0)
        return b_ds, b_dqk
    else:
        return b_ds, b_ds
