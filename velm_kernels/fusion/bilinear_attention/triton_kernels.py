"""Triton kernels of bilinear attention: scores, their softmax and its gradient, and the sums over pairs with weights.

Scores and weights are float32 `(batch, glimpses, regions, words)`, or attention as it is given; `v_live` and `q_live`
are bytes `(batch, rows)`, or None where all rows count.
"""

from __future__ import annotations

import triton
import triton.language as tl

from velm_kernels.triton.kernels import product_add, round_to, to_int64


@triton.jit
def _live(live, b, b_row, rows):
    b_live = b_row < rows
    if live is not None:
        b_live = b_live & (tl.load(live + to_int64(b) * rows + b_row, mask=b_live, other=0) != 0)
    return b_live


@triton.jit
def _tile(p, b_row, stride, b_live, b_column, columns):
    """Rows that count and columns of a matrix; zeros elsewhere."""
    b_ok = b_live[:, None] & (b_column < columns)[None, :]
    return tl.load(p + to_int64(b_row)[:, None] * stride + b_column[None, :], mask=b_ok, other=0.0)


@triton.jit
def scores_kernel(
    v,
    q,
    h,
    bias,
    scores,
    v_live,
    q_live,
    v_batch,
    v_stride,
    q_batch,
    q_stride,
    h_batch,
    glimpses,
    regions,
    words,
    k,
    region_blocks,
    word_blocks,
    masked,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """scores[b, g, i, j] = sum over k of (h[g, k] v[i, k]) q[j, k], plus bias[g]; `masked` where a pair does not
    count."""
    task = tl.program_id(0) // word_blocks
    b_i = (task % region_blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    b_j = (tl.program_id(0) % word_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    g = task // region_blocks % glimpses
    b = task // region_blocks // glimpses
    b_of_v, b_of_q = _live(v_live, b, b_i, regions), _live(q_live, b, b_j, words)
    p_v, p_q, p_h = v + to_int64(b) * v_batch, q + to_int64(b) * q_batch, h + to_int64(b) * h_batch + to_int64(g) * k
    b_sum = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in tl.range(0, k, BLOCK_K):
        b_k = start + tl.arange(0, BLOCK_K)
        b_h = tl.load(p_h + b_k, mask=b_k < k, other=0.0).to(tl.float32)
        b_v = _tile(p_v, b_i, v_stride, b_of_v, b_k, k).to(tl.float32) * b_h[None, :]
        b_q = _tile(p_q, b_j, q_stride, b_of_q, b_k, k)
        b_sum = product_add(round_to(b_v, v.dtype.element_ty), tl.trans(b_q), b_sum, PRECISION)
    if bias is not None:
        b_sum += tl.load(bias + g).to(tl.float32)
    b_sum = tl.where(b_of_v[:, None] & b_of_q[None, :], b_sum, masked)
    p_out = scores + ((to_int64(b) * glimpses + g) * regions + b_i)[:, None] * words + b_j[None, :]
    b_out = round_to(b_sum, scores.dtype.element_ty)
    tl.store(p_out, b_out, mask=(b_i < regions)[:, None] & (b_j < words)[None, :])


@triton.jit
def softmax_kernel(scores, maps, logits, v_live, q_live, glimpses, regions, words, BLOCK: tl.constexpr):
    """The softmax over all pairs of a glimpse that count; 0 for the others, and where none counts."""
    size = regions * words
    b = tl.program_id(0) // glimpses
    p_scores = scores + to_int64(tl.program_id(0)) * size
    b_largest = tl.full((BLOCK,), float("-inf"), tl.float32)
    b_sum = tl.zeros((BLOCK,), tl.float32)
    for start in tl.range(0, size, BLOCK):
        b_at = start + tl.arange(0, BLOCK)
        b_score = tl.load(p_scores + b_at, mask=b_at < size, other=float("-inf"))
        # NaN is not the largest, but it gets into the sum.
        b_new = tl.maximum(b_largest, b_score)
        b_base = tl.where(b_new == float("-inf"), 0.0, b_new)
        b_sum = b_sum * tl.exp(b_largest - b_base) + tl.exp(b_score - b_base)
        b_largest = b_new
    largest = tl.max(b_largest, 0)
    base = tl.where(largest == float("-inf"), 0.0, largest)
    total = tl.sum(b_sum * tl.exp(b_largest - base), 0)
    scale = 1.0 / total
    for start in tl.range(0, size, BLOCK):
        b_at = start + tl.arange(0, BLOCK)
        b_in = b_at < size
        b_ok = b_in & _live(v_live, b, b_at // words, regions) & _live(q_live, b, b_at % words, words)
        b_score = tl.load(p_scores + b_at, mask=b_in, other=float("-inf"))
        b_map = tl.where(b_ok, tl.exp(b_score - base) * scale, 0.0)
        tl.store(maps + to_int64(tl.program_id(0)) * size + b_at, round_to(b_map, maps.dtype.element_ty), mask=b_in)
        if logits is not None:
            b_logit = round_to(b_score, logits.dtype.element_ty)
            tl.store(logits + to_int64(tl.program_id(0)) * size + b_at, b_logit, mask=b_in)


@triton.jit
def score_gradient_kernel(
    maps, grad_maps, grad_logits, slopes, of_bias, v_live, q_live, glimpses, regions, words, BLOCK: tl.constexpr
):
    """slopes = maps * (grad_maps - their sum over maps * grad_maps) + grad_logits, and the sum of grad_logits."""
    size = regions * words
    b = tl.program_id(0) // glimpses
    at = to_int64(tl.program_id(0)) * size
    b_dot = tl.zeros((BLOCK,), tl.float32)
    b_bias = tl.zeros((BLOCK,), tl.float32)
    for start in tl.range(0, size, BLOCK):
        b_at = start + tl.arange(0, BLOCK)
        b_ok = (b_at < size) & _live(v_live, b, b_at // words, regions) & _live(q_live, b, b_at % words, words)
        if grad_maps is not None:
            b_map = tl.load(maps + at + b_at, mask=b_ok, other=0.0).to(tl.float32)
            b_dot += b_map * tl.load(grad_maps + at + b_at, mask=b_ok, other=0.0).to(tl.float32)
        if grad_logits is not None:
            b_bias += tl.load(grad_logits + at + b_at, mask=b_ok, other=0.0).to(tl.float32)
    along = tl.sum(b_dot, 0)
    tl.store(of_bias + tl.program_id(0), tl.sum(b_bias, 0))
    for start in tl.range(0, size, BLOCK):
        b_at = start + tl.arange(0, BLOCK)
        b_ok = (b_at < size) & _live(v_live, b, b_at // words, regions) & _live(q_live, b, b_at % words, words)
        b_slope = tl.zeros((BLOCK,), tl.float32)
        if grad_maps is not None:
            b_map = tl.load(maps + at + b_at, mask=b_ok, other=0.0).to(tl.float32)
            b_slope = b_map * (tl.load(grad_maps + at + b_at, mask=b_ok, other=0.0).to(tl.float32) - along)
        if grad_logits is not None:
            b_slope += tl.load(grad_logits + at + b_at, mask=b_ok, other=0.0).to(tl.float32)
        tl.store(slopes + at + b_at, b_slope, mask=b_at < size)


@triton.jit
def side_kernel(
    weights,
    other,
    h,
    out,
    live,
    other_live,
    weight_row,
    weight_other,
    other_batch,
    other_stride,
    h_batch,
    glimpses,
    rows,
    others,
    k,
    row_blocks,
    column_blocks,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out[b, i, k] = sum over g of h[g, k] (sum over j of weights[g, i, j] other[j, k]), for rows i of one side."""
    task = tl.program_id(0) // column_blocks
    b = task // row_blocks
    b_i = (task % row_blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    b_k = (tl.program_id(0) % column_blocks) * BLOCK_K + tl.arange(0, BLOCK_K)
    b_live = _live(live, b, b_i, rows)
    b_some = tl.zeros((BLOCK_N,), tl.int32)
    b_sum = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    for g in tl.range(0, glimpses):
        p_weights = weights + (to_int64(b) * glimpses + g) * rows * others
        b_product = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
        for start in tl.range(0, others, BLOCK_N):
            b_j = start + tl.arange(0, BLOCK_N)
            b_of_j = _live(other_live, b, b_j, others)
            b_some = b_some | b_of_j.to(tl.int32)
            p_tile = p_weights + to_int64(b_i)[:, None] * weight_row + to_int64(b_j)[None, :] * weight_other
            b_weight = tl.load(p_tile, mask=b_live[:, None] & b_of_j[None, :], other=0.0)
            b_other = _tile(other + to_int64(b) * other_batch, b_j, other_stride, b_of_j, b_k, k)
            b_weight = round_to(b_weight.to(tl.float32), other.dtype.element_ty)
            b_product = product_add(b_weight, b_other, b_product, PRECISION)
        b_h = tl.load(h + to_int64(b) * h_batch + to_int64(g) * k + b_k, mask=b_k < k, other=0.0).to(tl.float32)
        b_sum += b_product * b_h[None, :]
    # Without a row of the other side, sums of nothing were multiplied by h, which may be NaN or infinite.
    b_live = b_live & (tl.max(b_some, 0) > 0)
    p_out = out + (to_int64(b) * rows + b_i)[:, None] * k + b_k[None, :]
    b_out = round_to(tl.where(b_live[:, None], b_sum, 0.0), out.dtype.element_ty)
    tl.store(p_out, b_out, mask=(b_i < rows)[:, None] & (b_k < k)[None, :])


@triton.jit
def joint_kernel(
    weights,
    v,
    q,
    out,
    v_live,
    q_live,
    v_batch,
    v_stride,
    q_batch,
    q_stride,
    glimpses,
    regions,
    words,
    k,
    column_blocks,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out[b, g, k] = sum over i of v[i, k] (sum over j of weights[g, i, j] q[j, k])."""
    task = tl.program_id(0) // column_blocks
    b = task // glimpses
    b_k = (tl.program_id(0) % column_blocks) * BLOCK_K + tl.arange(0, BLOCK_K)
    p_weights = weights + to_int64(task) * regions * words
    b_sum = tl.zeros((BLOCK_K,), tl.float32)
    b_some_i, b_some_j = tl.zeros((BLOCK_M,), tl.int1), tl.zeros((BLOCK_N,), tl.int1)
    for first in tl.range(0, regions, BLOCK_M):
        b_i = first + tl.arange(0, BLOCK_M)
        b_of_i = _live(v_live, b, b_i, regions)
        b_some_i = b_some_i | b_of_i
        b_product = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
        for start in tl.range(0, words, BLOCK_N):
            b_j = start + tl.arange(0, BLOCK_N)
            b_of_j = _live(q_live, b, b_j, words)
            b_some_j = b_some_j | b_of_j
            p_tile = p_weights + to_int64(b_i)[:, None] * words + b_j[None, :]
            b_weight = tl.load(p_tile, mask=b_of_i[:, None] & b_of_j[None, :], other=0.0)
            b_q = _tile(q + to_int64(b) * q_batch, b_j, q_stride, b_of_j, b_k, k)
            b_weight = round_to(b_weight.to(tl.float32), q.dtype.element_ty)
            b_product = product_add(b_weight, b_q, b_product, PRECISION)
        b_v = _tile(v + to_int64(b) * v_batch, b_i, v_stride, b_of_i, b_k, k).to(tl.float32)
        b_sum += tl.sum(b_v * b_product, 0)
    # Rows that count, NaN included, were multiplied by zeros where the other side has none.
    has_pairs = (tl.max(b_some_i.to(tl.int32), 0) > 0) & (tl.max(b_some_j.to(tl.int32), 0) > 0)
    b_sum = tl.where(has_pairs, b_sum, 0.0)
    tl.store(out + to_int64(task) * k + b_k, round_to(b_sum, out.dtype.element_ty), mask=b_k < k)
