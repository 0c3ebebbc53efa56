"""Triton kernels of merge_attention, forward and backward."""

from __future__ import annotations

import triton
import triton.language as tl

from velm_kernels.triton.kernels import round_to, to_int64


@triton.jit
def _row_pointers(x, strides, b_row, heads, queries):
    b = b_row // (heads * queries)
    b_head = (b_row // queries) % heads
    return x + to_int64(b) * strides.batch + to_int64(b_head) * strides.head + to_int64(b_row % queries) * strides.row


@triton.jit
def merge_kernel(
    outs,
    logsumexps,
    out,
    logsumexp,
    outs_strides,
    out_strides,
    heads,
    queries,
    rows,
    SHARDS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Sum of the shards `outs` (a tuple of tensors) weighted by exp(their logsumexp - the total one), in order."""
    b_row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    b_in = b_row < rows
    b_row = tl.where(b_in, b_row, 0)
    b_d = tl.arange(0, BLOCK_D)
    b_max = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    for shard in tl.static_range(SHARDS):
        b_max = tl.maximum(b_max, tl.load(logsumexps[shard] + b_row, mask=b_in, other=-float("inf")))
    # NaN is not the largest, but it gets into the sum; so does an infinity that nothing is taken from.
    b_shift = tl.where(tl.abs(b_max) == float("inf"), 0.0, b_max)
    b_sum = tl.zeros((BLOCK_M,), tl.float32)
    b_acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for shard in tl.static_range(SHARDS):
        b_lse = tl.load(logsumexps[shard] + b_row, mask=b_in, other=-float("inf"))
        b_weight = tl.exp(b_lse - b_shift)
        # What has no keys is not read.
        b_ok = (b_in & (b_lse != -float("inf")))[:, None] & (b_d < DIM)[None, :]
        p_rows = _row_pointers(outs[shard], outs_strides[shard], b_row, heads, queries)
        b_out = tl.load(p_rows[:, None] + b_d[None, :], mask=b_ok, other=0.0).to(tl.float32)
        b_acc += b_weight[:, None] * b_out
        b_sum += b_weight
    b_empty = b_sum == 0.0
    b_safe = tl.where(b_empty, 1.0, b_sum)
    tl.store(logsumexp + b_row, tl.where(b_empty, -float("inf"), b_shift + tl.log(b_safe)), mask=b_in)
    p_rows = _row_pointers(out, out_strides, b_row, heads, queries)
    tl.store(
        p_rows[:, None] + b_d[None, :],
        round_to(b_acc / b_safe[:, None], out.dtype.element_ty),
        mask=b_in[:, None] & (b_d < DIM)[None, :],
    )


@triton.jit
def _merge_weight(b_lse, b_total):
    """exp(b_lse - b_total); 0 of a shard without keys, and NaN of the others where one is infinite. Divided by the sum
    over all shards nothing is left of the rounding of the total, which is as large as its last place."""
    b_weight = tl.where(b_total == float("inf"), float("nan"), tl.exp(b_lse - b_total))
    return tl.where(b_lse == -float("inf"), 0.0, b_weight)


@triton.jit
def merge_backward_kernel(
    grad_out,
    out,
    shard_logsumexp,
    logsumexps,
    logsumexp,
    grad_shard,
    products,
    grad_out_strides,
    out_strides,
    grad_shard_strides,
    heads,
    queries,
    rows,
    SHARDS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One shard: the gradient of its `out` = weight * grad_out (where `grad_shard` is given), and grad_out . out in
    `products` (where given)."""
    b_row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    b_in = b_row < rows
    b_row = tl.where(b_in, b_row, 0)
    b_d = tl.arange(0, BLOCK_D)
    b_lse = tl.load(shard_logsumexp + b_row, mask=b_in, other=-float("inf"))
    b_live = b_lse != -float("inf")
    b_ok = (b_in & b_live)[:, None] & (b_d < DIM)[None, :]
    p_do = _row_pointers(grad_out, grad_out_strides, b_row, heads, queries)
    b_do = tl.load(p_do[:, None] + b_d[None, :], mask=b_ok, other=0.0).to(tl.float32)
    if grad_shard is not None:
        b_total = tl.load(logsumexp + b_row, mask=b_in & b_live, other=0.0)
        b_sum = tl.zeros((BLOCK_M,), tl.float32)
        for shard in tl.static_range(SHARDS):
            b_other = tl.load(logsumexps[shard] + b_row, mask=b_in & b_live, other=-float("inf"))
            b_sum += _merge_weight(b_other, b_total)
        b_weight = _merge_weight(b_lse, b_total) / tl.where(b_sum == 0.0, 1.0, b_sum)
        p_grad = _row_pointers(grad_shard, grad_shard_strides, b_row, heads, queries)
        tl.store(
            p_grad[:, None] + b_d[None, :],
            round_to(b_weight[:, None] * b_do, grad_shard.dtype.element_ty),
            mask=b_in[:, None] & (b_d < DIM)[None, :],
        )
    if products is not None:
        p_out = _row_pointers(out, out_strides, b_row, heads, queries)
        b_out = tl.load(p_out[:, None] + b_d[None, :], mask=b_ok, other=0.0).to(tl.float32)
        tl.store(products + b_row, tl.sum(b_do * b_out, 1), mask=b_in)


@triton.jit
def merge_logsumexp_backward_kernel(
    products, logsumexps, logsumexp, grad_logsumexp, grad_logsumexps, rows, SHARDS: tl.constexpr, BLOCK: tl.constexpr
):
    """grad_lse_s = w_s * (product_s - sum over t of w_t * product_t + grad_lse); `products` and the gradients are
    (shards, rows), `logsumexps` too."""
    b_row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    b_in = b_row < rows
    b_total = tl.load(logsumexp + b_row, mask=b_in, other=-float("inf"))
    b_sum = tl.zeros((BLOCK,), tl.float32)
    b_mean = tl.zeros((BLOCK,), tl.float32)
    for shard in tl.range(0, SHARDS):
        b_at = to_int64(shard) * rows + b_row
        b_weight = _merge_weight(tl.load(logsumexps + b_at, mask=b_in, other=-float("inf")), b_total)
        b_sum += b_weight
        b_mean += b_weight * tl.load(products + b_at, mask=b_in, other=0.0)
    b_inverse = 1.0 / tl.where(b_sum == 0.0, 1.0, b_sum)
    b_mean = b_mean * b_inverse
    if grad_logsumexp is not None:
        b_mean -= tl.load(grad_logsumexp + b_row, mask=b_in, other=0.0)
    for shard in tl.range(0, SHARDS):
        b_at = to_int64(shard) * rows + b_row
        b_lse = tl.load(logsumexps + b_at, mask=b_in, other=-float("inf"))
        b_product = tl.load(products + b_at, mask=b_in, other=0.0)
        b_grad = _merge_weight(b_lse, b_total) * b_inverse * (b_product - b_mean)
        b_grad = tl.where(b_lse == -float("inf"), 0.0, b_grad)
        tl.store(grad_logsumexps + b_at, b_grad, mask=b_in)
