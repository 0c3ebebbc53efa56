"""Triton kernels of attention_pool's middle: a few rows attend over tokens, which are keys and values at once.

Scores are few beside the tokens, and are kept: `weights` hold them and what follows from them, float32, for each row
and token, `(segments, rows, tokens)` or, packed, `(rows, tokens)`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from velm_kernels.triton.kernels import product_add, round_to, sequence, to_int64


@triton.jit
def _token_range(tokens, segment):
    """First token of a segment, and how many it has, those that do not count among them."""
    return sequence(tokens.cu_seqlens, segment, tokens.tokens)


@triton.jit
def _live(tokens, segment, b_token, count):
    """Which tokens of a segment, numbered from its first, count."""
    b_live = b_token < count
    if tokens.lengths is not None:
        b_live = b_live & (b_token < tl.load(tokens.lengths + segment))
    if tokens.mask is not None:
        b_live = tl.load(tokens.mask + to_int64(segment) * tokens.tokens + b_token, mask=b_live, other=0) != 0
    return b_live


@triton.jit
def _weight_rows(weights, tokens, segment, b_row, rows):
    """Where the weights of rows of a segment begin."""
    if tokens.cu_seqlens is None:
        return weights + (to_int64(segment) * rows + b_row) * tokens.tokens
    else:
        return weights + to_int64(b_row) * tokens.tokens


@triton.jit
def products_kernel(
    a,
    x,
    weights,
    tokens,
    strides,
    a_segment,
    rows,
    dim,
    splits,
    row_blocks,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """weights = a x^T for the rows of a segment; its tiles of tokens are shared among `splits` programs."""
    segment = tl.program_id(0) // (splits * row_blocks)
    split = (tl.program_id(0) // row_blocks) % splits
    b_row = (tl.program_id(0) % row_blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    b_some = b_row < rows
    start, count = _token_range(tokens, segment)
    p_weights = _weight_rows(weights, tokens, segment, b_row, rows)
    p_a = a + to_int64(segment) * a_segment + to_int64(b_row)[:, None] * dim
    p_x = x + to_int64(segment) * strides.segment
    for first in tl.range(split * BLOCK_N, count, splits * BLOCK_N):
        b_token = first + tl.arange(0, BLOCK_N)
        b_live = _live(tokens, segment, b_token, count)
        b_sum = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for column in tl.range(0, dim, BLOCK_D):
            b_column = column + tl.arange(0, BLOCK_D)
            b_in = b_column < dim
            b_a = tl.load(p_a + b_column[None, :], mask=b_some[:, None] & b_in[None, :], other=0.0)
            p_token = p_x + to_int64(start + b_token)[None, :] * strides.token + b_column[:, None]
            b_x = tl.load(p_token, mask=b_live[None, :] & b_in[:, None], other=0.0)
            b_sum = product_add(b_a, b_x, b_sum, PRECISION)
        b_write = b_some[:, None] & (b_token < count)[None, :]
        tl.store(p_weights[:, None] + (start + b_token)[None, :], b_sum, mask=b_write)


@triton.jit
def softmax_kernel(weights, logsumexp, tokens, rows, BLOCK: tl.constexpr):
    """Scores to weights, of one row; 0 for the tokens that do not count."""
    segment, row = tl.program_id(0) // rows, tl.program_id(0) % rows
    start, count = _token_range(tokens, segment)
    p_row = _weight_rows(weights, tokens, segment, row, rows) + start
    b_largest = tl.full((BLOCK,), float("-inf"), tl.float32)
    b_sum = tl.zeros((BLOCK,), tl.float32)
    for first in tl.range(0, count, BLOCK):
        b_token = first + tl.arange(0, BLOCK)
        b_live = _live(tokens, segment, b_token, count)
        b_score = tl.load(p_row + b_token, mask=b_live, other=float("-inf"))
        b_new = tl.maximum(b_largest, b_score)
        b_base = tl.where(b_new == float("-inf"), 0.0, b_new)
        b_sum = b_sum * tl.exp(b_largest - b_base) + tl.exp(b_score - b_base)
        b_largest = b_new
    largest = tl.max(b_largest, 0)
    base = tl.where(largest == float("-inf"), 0.0, largest)
    total = tl.sum(b_sum * tl.exp(b_largest - base), 0)
    tl.store(logsumexp + to_int64(segment) * rows + row, base + tl.log(total))
    for first in tl.range(0, count, BLOCK):
        b_token = first + tl.arange(0, BLOCK)
        b_live = _live(tokens, segment, b_token, count)
        b_score = tl.load(p_row + b_token, mask=b_live, other=float("-inf"))
        # Not exp(score - logsumexp), which is rounded as coarsely as it is large.
        b_weight = tl.where(b_live, tl.exp(b_score - base) / total, 0.0)
        tl.store(p_row + b_token, b_weight, mask=b_token < count)


@triton.jit
def softmax_backward_kernel(weights, grad_weights, logsumexp, tokens, rows, BLOCK: tl.constexpr):
    """Of one row: scores to weights, and gradients of weights to those of scores. What is taken off them is the sum of
    the very same products: that of the gradient with the result, which is rounded, leaves little of the difference
    where one token has nearly all of the weight. All of them less that of the largest weight, `center`: what is left is
    a sum of what the other tokens have, with all its digits. Weights are divided by their sum, as the logsumexp is
    rounded too."""
    segment, row = tl.program_id(0) // rows, tl.program_id(0) % rows
    lse = tl.load(logsumexp + to_int64(segment) * rows + row)
    start, count = _token_range(tokens, segment)
    p_row = _weight_rows(weights, tokens, segment, row, rows) + start
    p_grad = _weight_rows(grad_weights, tokens, segment, row, rows) + start
    b_largest = tl.full((BLOCK,), -float("inf"), tl.float32)
    b_center = tl.zeros((BLOCK,), tl.float32)
    for first in tl.range(0, count, BLOCK):
        b_token = first + tl.arange(0, BLOCK)
        b_live = _live(tokens, segment, b_token, count)
        b_score = tl.load(p_row + b_token, mask=b_live, other=float("-inf"))
        b_larger = b_score > b_largest
        b_largest = tl.where(b_larger, b_score, b_largest)
        b_center = tl.where(b_larger, tl.load(p_grad + b_token, mask=b_larger, other=0.0), b_center)
    center = tl.sum(tl.where(tl.arange(0, BLOCK) == tl.argmax(b_largest, 0), b_center, 0.0), 0)
    # Of an infinite one nothing can be taken off.
    center = tl.where(tl.abs(center) < float("inf"), center, 0.0)
    b_sum = tl.zeros((BLOCK,), tl.float32)
    b_delta = tl.zeros((BLOCK,), tl.float32)
    for first in tl.range(0, count, BLOCK):
        b_token = first + tl.arange(0, BLOCK)
        b_live = _live(tokens, segment, b_token, count)
        b_score = tl.load(p_row + b_token, mask=b_live, other=float("-inf"))
        b_weight = tl.where(b_live, tl.exp(b_score - lse), 0.0)
        b_sum += b_weight
        b_delta += b_weight * (tl.load(p_grad + b_token, mask=b_live, other=center) - center)
        tl.store(p_row + b_token, b_weight, mask=b_token < count)
    total = tl.sum(b_sum, 0)
    delta = tl.sum(b_delta, 0) / total
    for first in tl.range(0, count, BLOCK):
        b_token = first + tl.arange(0, BLOCK)
        b_live = _live(tokens, segment, b_token, count)
        b_weight = tl.where(b_live, tl.load(p_row + b_token, mask=b_live, other=0.0) / total, 0.0)
        b_grad = tl.load(p_grad + b_token, mask=b_live, other=center) - center
        tl.store(p_row + b_token, b_weight, mask=b_token < count)
        tl.store(p_grad + b_token, tl.where(b_live, b_weight * (b_grad - delta), 0.0), mask=b_token < count)


@triton.jit
def pooled_kernel(
    weights,
    x,
    out,
    tokens,
    strides,
    rows,
    dim,
    row_blocks,
    dim_blocks,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """out = weights x: a block of rows of a segment and a block of columns."""
    segment = tl.program_id(0) // (row_blocks * dim_blocks)
    b_row = ((tl.program_id(0) // dim_blocks) % row_blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    b_column = (tl.program_id(0) % dim_blocks) * BLOCK_D + tl.arange(0, BLOCK_D)
    b_some, b_in = b_row < rows, b_column < dim
    start, count = _token_range(tokens, segment)
    p_weights = _weight_rows(weights, tokens, segment, b_row, rows)
    p_x = x + to_int64(segment) * strides.segment + b_column[None, :]
    b_sum = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for first in tl.range(0, count, BLOCK_N):
        b_token = first + tl.arange(0, BLOCK_N)
        b_live = _live(tokens, segment, b_token, count)
        p_tile = p_weights[:, None] + (start + b_token)[None, :]
        b_weight = tl.load(p_tile, mask=b_some[:, None] & b_live[None, :], other=0.0)
        p_token = p_x + to_int64(start + b_token)[:, None] * strides.token
        b_x = tl.load(p_token, mask=b_live[:, None] & b_in[None, :], other=0.0)
        b_sum = product_add(round_to(b_weight, x.dtype.element_ty), b_x, b_sum, PRECISION)
    p_out = out + (to_int64(segment) * rows + b_row)[:, None] * dim + b_column[None, :]
    tl.store(p_out, round_to(b_sum, out.dtype.element_ty), mask=b_some[:, None] & b_in[None, :])


@triton.jit
def tokens_kernel(
    weights,
    grad_weights,
    grad,
    a,
    grad_x,
    tokens,
    grad_segment,
    a_segment,
    rows,
    dim,
    splits,
    dim_blocks,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """grad_x = weights^T grad + grad_weights^T a; the tiles of a segment are shared among `splits` programs."""
    segment = tl.program_id(0) // (splits * dim_blocks)
    split = (tl.program_id(0) // dim_blocks) % splits
    b_column = (tl.program_id(0) % dim_blocks) * BLOCK_D + tl.arange(0, BLOCK_D)
    b_in = b_column < dim
    start, count = _token_range(tokens, segment)
    p_grad = grad + to_int64(segment) * rows * dim + b_column[None, :]
    p_a = a + to_int64(segment) * a_segment + b_column[None, :]
    p_out = grad_x + to_int64(segment) * grad_segment + b_column[None, :]
    for first in tl.range(split * BLOCK_N, count, splits * BLOCK_N):
        b_token = first + tl.arange(0, BLOCK_N)
        b_write = b_token < count
        b_sum = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
        for row in tl.range(0, rows, BLOCK_M):
            b_row = row + tl.arange(0, BLOCK_M)
            b_some = b_row < rows
            b_tile = b_write[:, None] & b_some[None, :]
            b_at = (start + b_token)[:, None]
            b_weight = tl.load(
                _weight_rows(weights, tokens, segment, b_row, rows)[None, :] + b_at, mask=b_tile, other=0.0
            )
            p_score = _weight_rows(grad_weights, tokens, segment, b_row, rows)[None, :] + b_at
            b_score = tl.load(p_score, mask=b_tile, other=0.0)
            b_both = b_some[:, None] & b_in[None, :]
            b_grad = tl.load(p_grad + to_int64(b_row)[:, None] * dim, mask=b_both, other=0.0)
            b_a = tl.load(p_a + to_int64(b_row)[:, None] * dim, mask=b_both, other=0.0)
            b_sum = product_add(round_to(b_weight, a.dtype.element_ty), b_grad, b_sum, PRECISION)
            b_sum = product_add(round_to(b_score, a.dtype.element_ty), b_a, b_sum, PRECISION)
        p_tile = p_out + to_int64(start + b_token)[:, None] * dim
        b_value = round_to(b_sum, grad_x.dtype.element_ty)
        # The weights of a token that does not count are 0, whose product with NaN is not.
        b_live = _live(tokens, segment, b_token, count)
        tl.store(p_tile, b_value, mask=b_live[:, None] & b_in[None, :])
        tl.store(p_tile, tl.zeros_like(b_value), mask=(b_write & ~b_live)[:, None] & b_in[None, :])
