"""Triton kernels of pooling over tokens."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from velm_kernels.triton.kernels import LOG2E, MAX_INDEX, round_to, to_int64

MEAN = tl.constexpr(0)
SUM = tl.constexpr(1)
MAX = tl.constexpr(2)
LOGSUMEXP = tl.constexpr(3)
GEM = tl.constexpr(4)
EPS = tl.constexpr(1e-6)
LARGEST = tl.constexpr(3.4028234663852886e38)
LEAST_NORMAL = tl.constexpr(1.1754943508222875e-38)
SQRT2 = tl.constexpr(1.4142135623730951)


class Tokens(NamedTuple):
    """Which tokens belong to which segment. Absent parts are None."""

    lengths: Any
    mask: Any
    cu_seqlens: Any
    # Of each segment, or of all where they are packed.
    tokens: Any
    segments: Any


class Strides(NamedTuple):
    """In elements. `segment` is 0 where tokens are packed."""

    segment: Any
    token: Any
    dim: Any


@triton.jit
def _bounds(tokens, segment):
    """First token of a segment and the one behind its last."""
    if tokens.cu_seqlens is not None:
        begin = tl.load(tokens.cu_seqlens + segment)
        end = tl.minimum(tl.load(tokens.cu_seqlens + segment + 1), tokens.tokens)
        begin = tl.maximum(begin, 0)
    else:
        begin = 0
        end = tokens.tokens
        if tokens.lengths is not None:
            end = tl.minimum(tl.load(tokens.lengths + segment), end)
    return begin, end


@triton.jit
def _log2(b_x):
    """log2 of what is not negative, to a relative error of 1e-7 near 1 too, where the device's own instruction has an
    absolute one: powers of hundreds multiply it."""
    b_is_small = b_x < LEAST_NORMAL
    b_bits = tl.where(b_is_small, b_x * 8388608.0, b_x).to(tl.int32, bitcast=True)
    b_exponent = (b_bits >> 23) - tl.where(b_is_small, 150, 127)
    b_m = ((b_bits & 0x7FFFFF) | 0x3F800000).to(tl.float32, bitcast=True)
    # The mantissa lies between the roots of 1/2 and 2.
    b_is_large = b_m > SQRT2
    b_m = tl.where(b_is_large, 0.5 * b_m, b_m)
    b_exponent = (b_exponent + b_is_large.to(tl.int32)).to(tl.float32)
    # ln(m) = 2 artanh(s) with |s| < 0.172; what is left out is below 1e-8 of it.
    b_s = (b_m - 1.0) / (b_m + 1.0)
    b_z = b_s * b_s
    b_series = b_z * (1.0 / 9.0) + 1.0 / 7.0
    b_series = b_series * b_z + 1.0 / 5.0
    b_series = b_series * b_z + 1.0 / 3.0
    b_log = (b_series * b_z * b_s + b_s) * (2.0 * LOG2E) + b_exponent
    # Infinity and NaN, and 0.
    return tl.where(b_x == 0.0, float("-inf"), tl.where(b_x < float("inf"), b_log, b_x))


@triton.jit
def _power(b_x, power, CUBE: tl.constexpr):
    if CUBE:
        return b_x * b_x * b_x
    else:
        return tl.exp2(power * _log2(b_x))


@triton.jit
def _ratio(b_x, b_y):
    """A quotient that is exactly 1 for equal numbers that are finite."""
    return tl.where((b_x == b_y) & (b_x < float("inf")), 1.0, b_x / b_y)


@triton.jit
def pool_kernel(
    x,
    out,
    stats,
    tokens,
    strides,
    power,
    dim,
    dim_blocks,
    MODE: tl.constexpr,
    CUBE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One segment and one block of columns: tiles of tokens [BM, BN], whose rows are reduced in the end."""
    segment = tl.program_id(0) // dim_blocks
    b_column = (tl.program_id(0) % dim_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    b_in = b_column < dim
    begin, end = _bounds(tokens, segment)
    p_x = x + to_int64(segment) * strides.segment + to_int64(b_column)[None, :] * strides.dim
    b_a = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    b_b = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    b_index = tl.full((BLOCK_M, BLOCK_N), MAX_INDEX, tl.int32)
    b_count = tl.zeros((BLOCK_M,), tl.int32)
    if MODE == MAX:
        b_a += float("-inf")
    if MODE == LOGSUMEXP:
        b_a -= LARGEST
    if MODE == GEM:
        b_b += EPS
    for first in tl.range(begin, end, BLOCK_M):
        b_token = first + tl.arange(0, BLOCK_M)
        b_live = b_token < end
        if tokens.mask is not None:
            b_live = tl.load(tokens.mask + to_int64(segment) * tokens.tokens + b_token, mask=b_live, other=0) != 0
        b_count += b_live.to(tl.int32)
        b_read = b_live[:, None] & b_in[None, :]
        b_x = tl.load(p_x + to_int64(b_token)[:, None] * strides.token, mask=b_read, other=0.0).to(tl.float32)
        if MODE == MEAN or MODE == SUM:  # noqa: SIM109
            b_a += b_x
        elif MODE == GEM:
            # Powers of quotients by the largest value b_b, which neither overflow nor vanish. NaN is not the largest,
            # nor is infinity: by the largest finite number it stays what it is.
            b_clamped = tl.where(b_x < EPS, EPS, b_x)
            b_new = tl.where(b_read & (b_clamped > b_b), tl.where(b_clamped < LARGEST, b_clamped, LARGEST), b_b)
            b_term = tl.where(b_read, _power(_ratio(b_clamped, b_new), power, CUBE), 0.0)
            b_a = b_a * _power(_ratio(b_b, b_new), power, CUBE) + b_term
            b_b = b_new
        elif MODE == MAX:
            # The first of what is read, then what is greater, and NaN, which stays.
            b_number = (b_token - begin)[:, None] + tl.zeros((1, BLOCK_N), tl.int32)
            b_take = b_read & ((b_index == MAX_INDEX) | ((b_x > b_a) | (b_x != b_x)) & (b_a == b_a))
            b_a = tl.where(b_take, b_x, b_a)
            b_index = tl.where(b_take, b_number, b_index)
        else:
            b_value = tl.where(b_read, b_x, float("-inf"))
            # NaN does not get into the largest, but into the sum; so does an infinity that nothing is taken from.
            b_new = tl.where(b_value > b_a, b_value, b_a)
            b_shift = tl.where(b_new == float("inf"), 0.0, b_new)
            b_b = b_b * tl.exp(b_a - b_shift) + tl.exp(b_value - b_shift)
            b_a = b_new
    count = tl.sum(b_count, 0)
    if MODE == MAX:
        b_nan = tl.sum((b_a != b_a).to(tl.int32), 0) > 0
        b_largest = tl.max(tl.where(b_a == b_a, b_a, float("-inf")), 0)
        b_hit = tl.where(b_nan[None, :], b_a != b_a, b_a == b_largest[None, :])
        b_first = tl.min(tl.where(b_hit, b_index, MAX_INDEX), 0)
        b_out = tl.where(b_nan, float("nan"), b_largest)
        tl.store(stats + to_int64(segment) * dim + b_column, tl.where(count > 0, b_first, -1), mask=b_in)
    elif MODE == LOGSUMEXP:
        b_largest = tl.max(b_a, 0)
        b_shift = tl.where(b_largest == float("inf"), 0.0, b_largest)
        b_out = b_shift + tl.log(tl.sum(b_b * tl.exp(b_a - b_shift[None, :]), 0))
    elif MODE == GEM:
        b_largest = tl.max(b_b, 0)
        b_sum = tl.sum(b_a * _power(_ratio(b_b, b_largest[None, :]), power, CUBE), 0)
        b_out = b_largest * tl.exp2(_log2(b_sum / tl.maximum(count, 1).to(tl.float32)) / power)
        b_out = tl.where(b_out < EPS, EPS, b_out)
    else:
        b_out = tl.sum(b_a, 0)
        if MODE == MEAN:
            b_out = b_out / tl.maximum(count, 1).to(tl.float32)
    b_out = tl.where(count > 0, b_out, 0.0)
    if MODE == LOGSUMEXP or MODE == GEM:  # noqa: SIM109
        tl.store(stats + to_int64(segment) * dim + b_column, b_out, mask=b_in)
    tl.store(out + to_int64(segment) * dim + b_column, round_to(b_out, out.dtype.element_ty), mask=b_in)


@triton.jit
def pool_counts_kernel(tokens, counts, BLOCK: tl.constexpr):
    """How many tokens of a segment count."""
    segment = tl.program_id(0)
    begin, end = _bounds(tokens, segment)
    count = end - begin
    if tokens.mask is not None:
        b_count = tl.zeros((BLOCK,), tl.int32)
        for first in tl.range(begin, end, BLOCK):
            b_token = first + tl.arange(0, BLOCK)
            p_mask = tokens.mask + to_int64(segment) * tokens.tokens + b_token
            b_count += (tl.load(p_mask, mask=b_token < end, other=0) != 0).to(tl.int32)
        count = tl.sum(b_count, 0)
    tl.store(counts + segment, count)


@triton.jit
def _segment_of(tokens, b_token, steps):
    """The last segment that begins at or before each of the packed tokens: by halving, `steps` times."""
    b_low = tl.zeros_like(b_token)
    b_high = b_low + tokens.segments
    for _ in tl.range(0, steps):
        b_middle = (b_low + b_high) // 2
        b_before = tl.load(tokens.cu_seqlens + b_middle) <= b_token
        b_low = tl.where(b_before & (b_middle > b_low), b_middle, b_low)
        b_high = tl.where(b_before, b_high, b_middle)
    return b_low


@triton.jit
def pool_backward_kernel(
    grad,
    x,
    stats,
    counts,
    grad_x,
    tokens,
    strides,
    grad_strides,
    power,
    dim,
    dim_blocks,
    token_blocks,
    steps,
    MODE: tl.constexpr,
    CUBE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The gradient of a tile of tokens [BM, BN]: of one segment, or of any where they are packed."""
    block = tl.program_id(0) // dim_blocks
    b_column = (tl.program_id(0) % dim_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    b_token = (block % token_blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    b_write = b_token < tokens.tokens
    b_number = b_token
    if tokens.cu_seqlens is not None:
        b_segment = _segment_of(tokens, tl.where(b_write, b_token, 0), steps)
        b_begin = tl.load(tokens.cu_seqlens + b_segment)
        b_end = tl.load(tokens.cu_seqlens + b_segment + 1)
        b_live = b_write & (b_token >= b_begin) & (b_token < b_end)
        b_number = b_token - b_begin
    else:
        segment = block // token_blocks
        b_segment = segment + tl.zeros((BLOCK_M,), tl.int32)
        _, end = _bounds(tokens, segment)
        b_live = b_token < end
        if tokens.mask is not None:
            b_live = tl.load(tokens.mask + to_int64(segment) * tokens.tokens + b_token, mask=b_live, other=0) != 0
    b_in = b_column < dim
    b_read = b_live[:, None] & b_in[None, :]
    b_at = to_int64(b_segment)[:, None] * dim + b_column[None, :]
    b_grad = tl.load(grad + b_at, mask=b_read, other=0.0).to(tl.float32)
    if MODE == MEAN or MODE == GEM:  # noqa: SIM109
        b_count = tl.load(counts + b_segment, mask=b_live, other=1)
        b_grad = b_grad / b_count.to(tl.float32)[:, None]
    if MODE == MAX:
        b_index = tl.load(stats + b_at, mask=b_read, other=-1)
        b_grad = tl.where(b_index == b_number[:, None], b_grad, 0.0)
    if MODE == LOGSUMEXP or MODE == GEM:  # noqa: SIM109
        p_x = x + to_int64(b_segment)[:, None] * strides.segment + to_int64(b_token)[:, None] * strides.token
        b_x = tl.load(p_x + to_int64(b_column)[None, :] * strides.dim, mask=b_read, other=0.0).to(tl.float32)
        b_stat = tl.load(stats + b_at, mask=b_read, other=0.0)
        if MODE == LOGSUMEXP:
            # Where all are -inf.
            b_none = b_stat == float("-inf")
            b_grad = tl.where(b_none, 0.0, b_grad * tl.exp(b_x - tl.where(b_none, 0.0, b_stat)))
        else:
            b_stat = tl.where(b_stat < EPS, EPS, b_stat)
            b_ratio = _ratio(tl.where(b_x < EPS, EPS, b_x), b_stat)
            if CUBE:
                b_factor = b_ratio * b_ratio
            else:
                b_factor = tl.where(power == 1.0, 1.0, _power(b_ratio, power - 1.0, False))
            b_grad = tl.where(b_x >= EPS, b_grad * b_factor, 0.0)
    b_result = round_to(tl.where(b_read, b_grad, 0.0), grad_x.dtype.element_ty)
    p_grad = grad_x + to_int64(b_token)[:, None] * grad_strides.token + to_int64(b_column)[None, :] * grad_strides.dim
    if tokens.cu_seqlens is None:
        p_grad += to_int64(b_segment)[:, None] * grad_strides.segment
    tl.store(p_grad, b_result, mask=b_write[:, None] & b_in[None, :])
