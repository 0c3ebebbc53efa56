"""Triton kernels of rotary and normed_rotary, forward and backward.

A program has a block of tokens of an entry, whose tables it reads once, and goes through the heads. A pair of columns
is (first, second): `rotated / 2` apart with LAYOUT 0, neighbours with 1, `rotated / 4` apart in each half of the
columns with 2.
"""

from __future__ import annotations

import triton
import triton.language as tl

from velm_kernels.triton.kernels import round_to, to_int64


@triton.jit
def first_column(b_pair, rotated, LAYOUT: tl.constexpr):
    if LAYOUT == 1:
        return 2 * b_pair
    elif LAYOUT == 2:
        return tl.where(b_pair >= rotated // 4, b_pair + rotated // 4, b_pair)
    else:
        return b_pair


@triton.jit
def pair_step(rotated, LAYOUT: tl.constexpr):
    """How many columns lie between the two of a pair."""
    if LAYOUT == 1:
        return rotated - rotated + 1
    elif LAYOUT == 2:
        return rotated // 4
    else:
        return rotated // 2


@triton.jit
def load_tables(cos, sin, batch, b_token, b_first, step, cos_batch, cos_row, sin_batch, sin_row, b_ok):
    """cos and sin of both columns of the pairs [BM, BP], in float32."""
    p_cos = cos + to_int64(batch) * cos_batch + to_int64(b_token)[:, None] * cos_row + b_first[None, :]
    p_sin = sin + to_int64(batch) * sin_batch + to_int64(b_token)[:, None] * sin_row + b_first[None, :]
    b_c1 = tl.load(p_cos, mask=b_ok, other=0.0).to(tl.float32)
    b_c2 = tl.load(p_cos + step, mask=b_ok, other=0.0).to(tl.float32)
    b_s1 = tl.load(p_sin, mask=b_ok, other=0.0).to(tl.float32)
    b_s2 = tl.load(p_sin + step, mask=b_ok, other=0.0).to(tl.float32)
    return b_c1, b_c2, b_s1, b_s2


@triton.jit
def load_row(p_row, b_first, step, b_rest, b_ok, b_rest_ok):
    """The columns of rows in float32: first and second ones of the pairs, and those that are not rotated."""
    b_a = tl.load(p_row + b_first[None, :], mask=b_ok, other=0.0).to(tl.float32)
    b_b = tl.load(p_row + b_first[None, :] + step, mask=b_ok, other=0.0).to(tl.float32)
    b_r = tl.load(p_row + b_rest[None, :], mask=b_rest_ok, other=0.0).to(tl.float32)
    return b_a, b_b, b_r


@triton.jit
def store_row(p_row, b_first, step, b_rest, b_ok, b_rest_ok, b_a, b_b, b_r):
    dtype: tl.constexpr = p_row.dtype.scalar.element_ty
    tl.store(p_row + b_first[None, :], round_to(b_a, dtype), mask=b_ok)
    tl.store(p_row + b_first[None, :] + step, round_to(b_b, dtype), mask=b_ok)
    tl.store(p_row + b_rest[None, :], round_to(b_r, dtype), mask=b_rest_ok)


@triton.jit
def rotary_kernel(
    query,
    key,
    cos,
    sin,
    rotated_query,
    rotated_key,
    query_batch,
    query_head,
    query_row,
    key_batch,
    key_head,
    key_row,
    to_query_batch,
    to_query_head,
    to_query_row,
    to_key_batch,
    to_key_head,
    to_key_row,
    cos_batch,
    cos_row,
    sin_batch,
    sin_row,
    query_heads,
    key_heads,
    tokens,
    head_dim,
    rotated,
    blocks,
    LAYOUT: tl.constexpr,
    BACK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Queries and keys rotated; with BACK by the transpose."""
    batch = tl.program_id(0) // blocks
    b_token = (tl.program_id(0) % blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    b_pair, b_rest = tl.arange(0, BLOCK_P), rotated + tl.arange(0, BLOCK_R)
    b_some = (b_token < tokens)[:, None]
    b_ok, b_rest_ok = b_some & (b_pair < rotated // 2)[None, :], b_some & (b_rest < head_dim)[None, :]
    b_first, step = first_column(b_pair, rotated, LAYOUT), pair_step(rotated, LAYOUT)
    b_c1, b_c2, b_s1, b_s2 = load_tables(
        cos, sin, batch, b_token, b_first, step, cos_batch, cos_row, sin_batch, sin_row, b_ok
    )
    if BACK:
        b_t1 = b_s2
        b_t2 = -b_s1
    else:
        b_t1 = -b_s1
        b_t2 = b_s2
    b_row = to_int64(b_token)[:, None]
    for head in tl.range(0, query_heads):
        p_from = query + to_int64(batch) * query_batch + to_int64(head) * query_head + b_row * query_row
        p_to = rotated_query + to_int64(batch) * to_query_batch + to_int64(head) * to_query_head + b_row * to_query_row
        b_a, b_b, b_r = load_row(p_from, b_first, step, b_rest, b_ok, b_rest_ok)
        b_y1, b_y2 = b_a * b_c1 + b_b * b_t1, b_b * b_c2 + b_a * b_t2
        store_row(p_to, b_first, step, b_rest, b_ok, b_rest_ok, b_y1, b_y2, b_r)
    for head in tl.range(0, key_heads):
        p_from = key + to_int64(batch) * key_batch + to_int64(head) * key_head + b_row * key_row
        p_to = rotated_key + to_int64(batch) * to_key_batch + to_int64(head) * to_key_head + b_row * to_key_row
        b_a, b_b, b_r = load_row(p_from, b_first, step, b_rest, b_ok, b_rest_ok)
        b_y1, b_y2 = b_a * b_c1 + b_b * b_t1, b_b * b_c2 + b_a * b_t2
        store_row(p_to, b_first, step, b_rest, b_ok, b_rest_ok, b_y1, b_y2, b_r)


@triton.jit
def rotary_tables_kernel(
    grad_query,
    grad_key,
    query,
    key,
    grad_cos,
    grad_sin,
    grad_query_batch,
    grad_query_head,
    grad_query_row,
    grad_key_batch,
    grad_key_head,
    grad_key_row,
    query_batch,
    query_head,
    query_row,
    key_batch,
    key_head,
    key_row,
    query_heads,
    key_heads,
    tokens,
    rotated,
    blocks,
    LAYOUT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """The gradients of cos and sin (batch, tokens, rotated): sums over the heads of both."""
    batch = tl.program_id(0) // blocks
    b_token = (tl.program_id(0) % blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    b_pair = tl.arange(0, BLOCK_P)
    b_ok = (b_token < tokens)[:, None] & (b_pair < rotated // 2)[None, :]
    b_first, step = first_column(b_pair, rotated, LAYOUT), pair_step(rotated, LAYOUT)
    b_row, b_column = to_int64(b_token)[:, None], b_first[None, :]
    b_c1, b_c2 = tl.zeros((BLOCK_M, BLOCK_P), tl.float32), tl.zeros((BLOCK_M, BLOCK_P), tl.float32)
    b_s1, b_s2 = tl.zeros((BLOCK_M, BLOCK_P), tl.float32), tl.zeros((BLOCK_M, BLOCK_P), tl.float32)
    for head in tl.range(0, query_heads):
        p_g = grad_query + to_int64(batch) * grad_query_batch + to_int64(head) * grad_query_head
        p_x = query + to_int64(batch) * query_batch + to_int64(head) * query_head
        b_g = tl.load(p_g + b_row * grad_query_row + b_column, mask=b_ok, other=0.0).to(tl.float32)
        b_h = tl.load(p_g + b_row * grad_query_row + b_column + step, mask=b_ok, other=0.0).to(tl.float32)
        b_a = tl.load(p_x + b_row * query_row + b_column, mask=b_ok, other=0.0).to(tl.float32)
        b_b = tl.load(p_x + b_row * query_row + b_column + step, mask=b_ok, other=0.0).to(tl.float32)
        b_c1, b_c2, b_s1, b_s2 = b_c1 + b_g * b_a, b_c2 + b_h * b_b, b_s1 - b_g * b_b, b_s2 + b_h * b_a
    for head in tl.range(0, key_heads):
        p_g = grad_key + to_int64(batch) * grad_key_batch + to_int64(head) * grad_key_head
        p_x = key + to_int64(batch) * key_batch + to_int64(head) * key_head
        b_g = tl.load(p_g + b_row * grad_key_row + b_column, mask=b_ok, other=0.0).to(tl.float32)
        b_h = tl.load(p_g + b_row * grad_key_row + b_column + step, mask=b_ok, other=0.0).to(tl.float32)
        b_a = tl.load(p_x + b_row * key_row + b_column, mask=b_ok, other=0.0).to(tl.float32)
        b_b = tl.load(p_x + b_row * key_row + b_column + step, mask=b_ok, other=0.0).to(tl.float32)
        b_c1, b_c2, b_s1, b_s2 = b_c1 + b_g * b_a, b_c2 + b_h * b_b, b_s1 - b_g * b_b, b_s2 + b_h * b_a
    b_at = (to_int64(batch) * tokens + b_row) * rotated + b_column
    if grad_cos is not None:
        tl.store(grad_cos + b_at, round_to(b_c1, grad_cos.dtype.element_ty), mask=b_ok)
        tl.store(grad_cos + b_at + step, round_to(b_c2, grad_cos.dtype.element_ty), mask=b_ok)
    if grad_sin is not None:
        tl.store(grad_sin + b_at, round_to(b_s1, grad_sin.dtype.element_ty), mask=b_ok)
        tl.store(grad_sin + b_at + step, round_to(b_s2, grad_sin.dtype.element_ty), mask=b_ok)


@triton.jit
def load_weight(weight, head, head_dim, b_first, step, b_rest, b_pair_ok, b_rest_in, OVER_HEADS: tl.constexpr):
    p_weight = weight + head * head_dim if OVER_HEADS else weight
    b_w1 = tl.load(p_weight + b_first, mask=b_pair_ok, other=0.0).to(tl.float32)[None, :]
    b_w2 = tl.load(p_weight + b_first + step, mask=b_pair_ok, other=0.0).to(tl.float32)[None, :]
    b_wr = tl.load(p_weight + b_rest, mask=b_rest_in, other=0.0).to(tl.float32)[None, :]
    return b_w1, b_w2, b_wr


@triton.jit
def inverse_rms(
    x, batch, head, heads, x_batch, x_head, x_row, b_row, head_dim, eps, b_first, step, b_rest, b_ok, b_rest_ok,
    OVER_HEADS: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """1 / sqrt(mean of x^2 + eps) of the tokens [BM]: of a head, or of all."""
    b_squares = tl.zeros((BLOCK_M,), tl.float32)
    for number in tl.range(0 if OVER_HEADS else head, heads if OVER_HEADS else head + 1):
        p_row = x + to_int64(batch) * x_batch + to_int64(number) * x_head + b_row * x_row
        b_a, b_b, b_r = load_row(p_row, b_first, step, b_rest, b_ok, b_rest_ok)
        b_squares += tl.sum(b_a * b_a, 1) + tl.sum(b_b * b_b, 1) + tl.sum(b_r * b_r, 1)
    count = heads * head_dim if OVER_HEADS else head_dim
    return 1.0 / tl.sqrt(b_squares / count + eps)


@triton.jit
def normed_rotary_kernel(
    x,
    weight,
    cos,
    sin,
    out,
    x_batch,
    x_head,
    x_row,
    to_batch,
    to_head,
    to_row,
    cos_batch,
    cos_row,
    sin_batch,
    sin_row,
    eps,
    heads,
    tokens,
    head_dim,
    rotated,
    blocks,
    LAYOUT: tl.constexpr,
    OVER_HEADS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Queries, or keys, rotated after their norm."""
    batch = tl.program_id(0) // blocks
    b_token = (tl.program_id(0) % blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    b_pair, b_rest = tl.arange(0, BLOCK_P), rotated + tl.arange(0, BLOCK_R)
    b_some, b_pair_ok, b_rest_in = (b_token < tokens)[:, None], b_pair < rotated // 2, b_rest < head_dim
    b_ok, b_rest_ok = b_some & b_pair_ok[None, :], b_some & b_rest_in[None, :]
    b_first, step = first_column(b_pair, rotated, LAYOUT), pair_step(rotated, LAYOUT)
    b_c1, b_c2, b_s1, b_s2 = load_tables(
        cos, sin, batch, b_token, b_first, step, cos_batch, cos_row, sin_batch, sin_row, b_ok
    )
    b_row = to_int64(b_token)[:, None]
    b_inverse = tl.zeros((BLOCK_M,), tl.float32)
    if OVER_HEADS:
        b_inverse = inverse_rms(
            x, batch, 0, heads, x_batch, x_head, x_row, b_row, head_dim, eps, b_first, step, b_rest, b_ok, b_rest_ok,
            OVER_HEADS, BLOCK_M,
        )  # fmt: skip
    for head in tl.range(0, heads):
        p_row = x + to_int64(batch) * x_batch + to_int64(head) * x_head + b_row * x_row
        b_a, b_b, b_r = load_row(p_row, b_first, step, b_rest, b_ok, b_rest_ok)
        if not OVER_HEADS:
            b_squares = tl.sum(b_a * b_a, 1) + tl.sum(b_b * b_b, 1) + tl.sum(b_r * b_r, 1)
            b_inverse = 1.0 / tl.sqrt(b_squares / head_dim + eps)
        b_w1, b_w2, b_wr = load_weight(weight, head, head_dim, b_first, step, b_rest, b_pair_ok, b_rest_in, OVER_HEADS)
        b_a, b_b, b_r = (
            b_a * b_inverse[:, None] * b_w1,
            b_b * b_inverse[:, None] * b_w2,
            b_r * b_inverse[:, None] * b_wr,
        )
        p_to = out + to_int64(batch) * to_batch + to_int64(head) * to_head + b_row * to_row
        b_y1, b_y2 = b_a * b_c1 - b_b * b_s1, b_b * b_c2 + b_a * b_s2
        store_row(p_to, b_first, step, b_rest, b_ok, b_rest_ok, b_y1, b_y2, b_r)


@triton.jit
def normed_rotary_backward_kernel(
    grad,
    x,
    weight,
    cos,
    sin,
    grad_x,
    partial_weight,
    grad_batch,
    grad_head,
    grad_row,
    x_batch,
    x_head,
    x_row,
    to_batch,
    to_head,
    to_row,
    cos_batch,
    cos_row,
    sin_batch,
    sin_row,
    eps,
    heads,
    tokens,
    head_dim,
    rotated,
    blocks,
    LAYOUT: tl.constexpr,
    OVER_HEADS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """The gradients of x and, as a sum of each program, of the weight: (programs, elements of the weight)."""
    batch = tl.program_id(0) // blocks
    b_token = (tl.program_id(0) % blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    b_pair, b_rest = tl.arange(0, BLOCK_P), rotated + tl.arange(0, BLOCK_R)
    b_some, b_pair_ok, b_rest_in = (b_token < tokens)[:, None], b_pair < rotated // 2, b_rest < head_dim
    b_ok, b_rest_ok = b_some & b_pair_ok[None, :], b_some & b_rest_in[None, :]
    b_first, step = first_column(b_pair, rotated, LAYOUT), pair_step(rotated, LAYOUT)
    b_c1, b_c2, b_s1, b_s2 = load_tables(
        cos, sin, batch, b_token, b_first, step, cos_batch, cos_row, sin_batch, sin_row, b_ok
    )
    b_row = to_int64(b_token)[:, None]
    b_inverse = tl.zeros((BLOCK_M,), tl.float32)
    b_mean = tl.zeros((BLOCK_M,), tl.float32)
    if OVER_HEADS:
        b_inverse = inverse_rms(
            x, batch, 0, heads, x_batch, x_head, x_row, b_row, head_dim, eps, b_first, step, b_rest, b_ok, b_rest_ok,
            OVER_HEADS, BLOCK_M,
        )  # fmt: skip
        for head in tl.range(0, heads):
            p_g = grad + to_int64(batch) * grad_batch + to_int64(head) * grad_head + b_row * grad_row
            p_x = x + to_int64(batch) * x_batch + to_int64(head) * x_head + b_row * x_row
            b_g, b_h, b_gr = load_row(p_g, b_first, step, b_rest, b_ok, b_rest_ok)
            b_a, b_b, b_r = load_row(p_x, b_first, step, b_rest, b_ok, b_rest_ok)
            b_w1, b_w2, b_wr = load_weight(
                weight, head, head_dim, b_first, step, b_rest, b_pair_ok, b_rest_in, OVER_HEADS
            )
            b_d1, b_d2 = b_g * b_c1 + b_h * b_s2, b_h * b_c2 - b_g * b_s1
            b_mean += tl.sum(b_d1 * b_w1 * b_a, 1) + tl.sum(b_d2 * b_w2 * b_b, 1) + tl.sum(b_gr * b_wr * b_r, 1)
        b_mean = b_mean * b_inverse / (heads * head_dim)
    b_sum1, b_sum2 = tl.zeros((BLOCK_P,), tl.float32), tl.zeros((BLOCK_P,), tl.float32)
    b_sum_rest = tl.zeros((BLOCK_R,), tl.float32)
    for head in tl.range(0, heads):
        p_g = grad + to_int64(batch) * grad_batch + to_int64(head) * grad_head + b_row * grad_row
        p_x = x + to_int64(batch) * x_batch + to_int64(head) * x_head + b_row * x_row
        b_g, b_h, b_gr = load_row(p_g, b_first, step, b_rest, b_ok, b_rest_ok)
        b_a, b_b, b_r = load_row(p_x, b_first, step, b_rest, b_ok, b_rest_ok)
        if not OVER_HEADS:
            b_squares = tl.sum(b_a * b_a, 1) + tl.sum(b_b * b_b, 1) + tl.sum(b_r * b_r, 1)
            b_inverse = 1.0 / tl.sqrt(b_squares / head_dim + eps)
        # x over its RMS, and what comes in rotated back.
        b_a, b_b, b_r = b_a * b_inverse[:, None], b_b * b_inverse[:, None], b_r * b_inverse[:, None]
        b_d1, b_d2 = b_g * b_c1 + b_h * b_s2, b_h * b_c2 - b_g * b_s1
        if partial_weight is not None:
            b_of1, b_of2, b_of_rest = tl.sum(b_d1 * b_a, 0), tl.sum(b_d2 * b_b, 0), tl.sum(b_gr * b_r, 0)
            if OVER_HEADS:
                p_sum = partial_weight + (to_int64(tl.program_id(0)) * heads + head) * head_dim
                tl.store(p_sum + b_first, b_of1, mask=b_pair_ok)
                tl.store(p_sum + b_first + step, b_of2, mask=b_pair_ok)
                tl.store(p_sum + b_rest, b_of_rest, mask=b_rest_in)
            else:
                b_sum1, b_sum2, b_sum_rest = b_sum1 + b_of1, b_sum2 + b_of2, b_sum_rest + b_of_rest
        if grad_x is not None:
            b_w1, b_w2, b_wr = load_weight(
                weight, head, head_dim, b_first, step, b_rest, b_pair_ok, b_rest_in, OVER_HEADS
            )
            b_d1, b_d2, b_gr = b_d1 * b_w1, b_d2 * b_w2, b_gr * b_wr
            if not OVER_HEADS:
                b_mean = (tl.sum(b_d1 * b_a, 1) + tl.sum(b_d2 * b_b, 1) + tl.sum(b_gr * b_r, 1)) / head_dim
            b_d1, b_d2, b_gr = (
                b_inverse[:, None] * (b_d1 - b_mean[:, None] * b_a),
                b_inverse[:, None] * (b_d2 - b_mean[:, None] * b_b),
                b_inverse[:, None] * (b_gr - b_mean[:, None] * b_r),
            )
            p_to = grad_x + to_int64(batch) * to_batch + to_int64(head) * to_head + b_row * to_row
            store_row(p_to, b_first, step, b_rest, b_ok, b_rest_ok, b_d1, b_d2, b_gr)
    if (partial_weight is not None) and (not OVER_HEADS):
        p_sum = partial_weight + to_int64(tl.program_id(0)) * head_dim
        tl.store(p_sum + b_first, b_sum1, mask=b_pair_ok)
        tl.store(p_sum + b_first + step, b_sum2, mask=b_pair_ok)
        tl.store(p_sum + b_rest, b_sum_rest, mask=b_rest_in)
