"""The Triton kernels of multiscale_deformable_attention.

A program has some queries of one head, and goes through their samples one after the other.
"""

from __future__ import annotations

import triton
import triton.language as tl

from velm_kernels.triton.kernels import round_to, to_int64


@triton.jit
def load_sides(shapes, level):
    """Height and width of a level: tokens are counted in 32 bits, and only places in memory need more."""
    return tl.load(shapes + 2 * level).to(tl.int32), tl.load(shapes + 2 * level + 1).to(tl.int32)


@triton.jit
def load_sample(locations, weights, b_sample, b_some, width, height):
    """The upper left corner of a sample in a level, column and row, how far from it the sample lies, and its weight."""
    b_x = tl.load(locations + 2 * b_sample, mask=b_some, other=0.0).to(tl.float32) * width.to(tl.float32) - 0.5
    b_y = tl.load(locations + 2 * b_sample + 1, mask=b_some, other=0.0).to(tl.float32) * height.to(tl.float32) - 0.5
    b_left, b_above = tl.floor(b_x), tl.floor(b_y)
    b_weight = tl.load(weights + b_sample, mask=b_some, other=0.0).to(tl.float32)
    return b_left, b_above, b_x - b_left, b_y - b_above, b_weight


@triton.jit
def corner(b_left, b_above, b_right, b_lower, RIGHT: tl.constexpr, BELOW: tl.constexpr, first, width, height):
    """The share of one of the four corners, and the number of its token, -1 outside of the level."""
    b_column, b_row = b_left + RIGHT, b_above + BELOW
    # Not so for NaN.
    b_inside = (b_column >= 0) & (b_column < width) & (b_row >= 0) & (b_row < height)
    b_token = tl.where(b_inside, b_row, 0.0).to(tl.int32) * width + tl.where(b_inside, b_column, 0.0).to(tl.int32)
    b_share = (b_right if RIGHT else 1.0 - b_right) * (b_lower if BELOW else 1.0 - b_lower)
    return b_share, tl.where(b_inside, first + b_token, -1)


@triton.jit
def multiscale_deformable_attention_kernel(
    value,
    shapes,
    locations,
    weights,
    out,
    batch_stride,
    token_stride,
    head_stride,
    tokens,
    queries,
    heads,
    d,
    levels,
    points,
    blocks,
    dim_blocks,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """A tile of one head's result [BM, BN]."""
    of_head = tl.program_id(0) // (blocks * dim_blocks)
    batch, head = of_head // heads, of_head % heads
    b_query = ((tl.program_id(0) // dim_blocks) % blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    b_column = (tl.program_id(0) % dim_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    b_some, b_in = b_query < queries, b_column < d
    b_place = (to_int64(batch) * queries + b_query) * heads + head
    p_value = value + to_int64(batch) * batch_stride + to_int64(head) * head_stride + b_column[None, :]
    b_sum = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    first = 0
    for level in tl.range(0, levels):
        height, width = load_sides(shapes, level)
        for point in tl.range(0, points):
            b_sample = (b_place * levels + level) * points + point
            b_left, b_above, b_right, b_lower, b_weight = load_sample(
                locations, weights, b_sample, b_some, width, height
            )
            b_sampled = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            for number in tl.static_range(4):
                b_share, b_token = corner(
                    b_left, b_above, b_right, b_lower, number % 2, number // 2, first, width, height
                )
                b_live = b_some & (b_token >= 0) & (b_token < tokens)
                p_row = p_value + to_int64(tl.where(b_live, b_token, 0))[:, None] * token_stride
                b_row = tl.load(p_row, mask=b_live[:, None] & b_in[None, :], other=0.0).to(tl.float32)
                b_sampled += b_share[:, None] * b_row
            b_sum += b_weight[:, None] * b_sampled
        first += height * width
    p_out = out + (b_place * d)[:, None] + b_column[None, :]
    tl.store(p_out, round_to(b_sum, out.dtype.element_ty), mask=b_some[:, None] & b_in[None, :])


@triton.jit
def multiscale_deformable_attention_samples_kernel(
    grad,
    value,
    shapes,
    locations,
    weights,
    grad_locations,
    grad_weights,
    batch_stride,
    token_stride,
    head_stride,
    tokens,
    queries,
    heads,
    d,
    levels,
    points,
    blocks,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Gradients of locations and weights, from what comes in times each corner [BM]."""
    of_head = tl.program_id(0) // blocks
    batch, head = of_head // heads, of_head % heads
    b_query = (tl.program_id(0) % blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    b_some = b_query < queries
    b_place = (to_int64(batch) * queries + b_query) * heads + head
    p_value = value + to_int64(batch) * batch_stride + to_int64(head) * head_stride
    first = 0
    for level in tl.range(0, levels):
        height, width = load_sides(shapes, level)
        for point in tl.range(0, points):
            b_sample = (b_place * levels + level) * points + point
            b_left, b_above, b_right, b_lower, b_weight = load_sample(
                locations, weights, b_sample, b_some, width, height
            )
            b_along = tl.zeros((BLOCK_M,), tl.float32)
            b_down = tl.zeros((BLOCK_M,), tl.float32)
            b_of_weight = tl.zeros((BLOCK_M,), tl.float32)
            for start in tl.range(0, d, BLOCK_N):
                b_column = start + tl.arange(0, BLOCK_N)
                b_in = b_column < d
                p_grad = grad + (b_place * d)[:, None] + b_column[None, :]
                b_grad = tl.load(p_grad, mask=b_some[:, None] & b_in[None, :], other=0.0).to(tl.float32)
                for number in tl.static_range(4):
                    b_share, b_token = corner(
                        b_left, b_above, b_right, b_lower, number % 2, number // 2, first, width, height
                    )
                    b_live = b_some & (b_token >= 0) & (b_token < tokens)
                    p_row = p_value + to_int64(tl.where(b_live, b_token, 0))[:, None] * token_stride
                    b_mask = b_live[:, None] & b_in[None, :]
                    b_row = tl.load(p_row + b_column[None, :], mask=b_mask, other=0.0).to(tl.float32)
                    b_dot = tl.sum(b_grad * b_row, 1)
                    b_of_weight += b_share * b_dot
                    b_along += (b_lower if number // 2 else 1.0 - b_lower) * (b_dot if number % 2 else -b_dot)
                    b_down += (b_right if number % 2 else 1.0 - b_right) * (b_dot if number // 2 else -b_dot)
            if grad_locations is not None:
                dtype = grad_locations.dtype.element_ty
                b_x, b_y = b_weight * b_along * width.to(tl.float32), b_weight * b_down * height.to(tl.float32)
                tl.store(grad_locations + 2 * b_sample, round_to(b_x, dtype), mask=b_some)
                tl.store(grad_locations + 2 * b_sample + 1, round_to(b_y, dtype), mask=b_some)
            if grad_weights is not None:
                tl.store(grad_weights + b_sample, round_to(b_of_weight, grad_weights.dtype.element_ty), mask=b_some)
        first += height * width


@triton.jit
def multiscale_deformable_attention_corners_kernel(
    shapes,
    locations,
    weights,
    token,
    share,
    tokens,
    queries,
    heads,
    levels,
    points,
    blocks,
    BLOCK: tl.constexpr,
):
    """For each corner of each sample of a head: its token, `tokens` where it lies outside, and weight times share."""
    of_head = tl.program_id(0) // blocks
    batch, head = of_head // heads, of_head % heads
    b_query = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    b_some = b_query < queries
    b_place = (to_int64(batch) * queries + b_query) * heads + head
    first = 0
    for level in tl.range(0, levels):
        height, width = load_sides(shapes, level)
        for point in tl.range(0, points):
            b_sample = (b_place * levels + level) * points + point
            b_left, b_above, b_right, b_lower, b_weight = load_sample(
                locations, weights, b_sample, b_some, width, height
            )
            b_to = ((to_int64(of_head) * queries + b_query) * levels + level) * points + point
            for number in tl.static_range(4):
                b_share, b_token = corner(
                    b_left, b_above, b_right, b_lower, number % 2, number // 2, first, width, height
                )
                b_token = tl.where((b_token >= 0) & (b_token < tokens), b_token, tokens)
                tl.store(token + 4 * b_to + number, b_token, mask=b_some)
                tl.store(share + 4 * b_to + number, b_weight * b_share, mask=b_some)
        first += height * width


@triton.jit
def multiscale_deformable_attention_tokens_kernel(
    grad,
    corner_order,
    corner_offsets,
    share,
    grad_value,
    tokens,
    queries,
    heads,
    d,
    corners,
    blocks,
    dim_blocks,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The gradient of some tokens of a head [BM, BN]: the sum of their corners in the order of the samples. A program
    takes as many steps as the token with most of them has corners."""
    of_head = tl.program_id(0) // (blocks * dim_blocks)
    batch, head = of_head // heads, of_head % heads
    b_token = ((tl.program_id(0) // dim_blocks) % blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    b_column = (tl.program_id(0) % dim_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    b_some, b_in = b_token < tokens, b_column < d
    p_bounds = corner_offsets + to_int64(of_head) * (tokens + 1) + b_token
    b_first = tl.load(p_bounds, mask=b_some, other=0)
    b_last = tl.load(p_bounds + 1, mask=b_some, other=0)
    begin = to_int64(of_head) * queries * corners
    b_sum = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in tl.range(0, tl.max(b_last - b_first, 0)):
        b_live = b_first + step < b_last
        b_corner = tl.load(corner_order + begin + b_first + step, mask=b_live, other=0)
        b_share = tl.load(share + begin + b_corner, mask=b_live, other=0.0)
        b_query = to_int64(b_corner) // corners
        p_grad = grad + (((to_int64(batch) * queries + b_query) * heads + head) * d)[:, None] + b_column[None, :]
        b_grad = tl.load(p_grad, mask=b_live[:, None] & b_in[None, :], other=0.0).to(tl.float32)
        b_sum += b_share[:, None] * b_grad
    p_out = grad_value + ((to_int64(batch) * tokens + b_token) * heads + head)[:, None] * d + b_column[None, :]
    tl.store(p_out, round_to(b_sum, grad_value.dtype.element_ty), mask=b_some[:, None] & b_in[None, :])
