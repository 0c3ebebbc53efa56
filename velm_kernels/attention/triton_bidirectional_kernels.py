"""Triton kernel of bidirectional attention's backward pass: the gradients of one side from shared scores."""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_tiles import (
    base2,
    dropped,
    grad_scores,
    load_rows,
    open_rows,
    product,
    product_add,
    round_to,
    store_rows,
    wide,
)


@triton.jit
def grad_side_kernel(
    query_x,
    query_y,
    value_x,
    value_y,
    grad_out_x,
    grad_out_y,
    logsumexp_x,
    logsumexp_y,
    delta_x,
    delta_y,
    mask_x,
    mask_y,
    mask_x_words,
    mask_y_words,
    dropout_x,
    dropout_y,
    grad_query,
    grad_value,
    query_x_strides,
    query_y_strides,
    value_x_strides,
    value_y_strides,
    grad_out_x_strides,
    grad_out_y_strides,
    grad_query_strides,
    grad_value_strides,
    heads,
    length_x,
    length_y,
    scale,
    scale_base2,
    row_blocks,
    HAS_X: tl.constexpr,
    HAS_Y: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM_X: tl.constexpr,
    DIM_Y: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_Y: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradients of query_x and value_x, one block of rows of x a program, from one pass over the scores with y.

    Direction x is attention of x over y (out_x = P_x value_y), direction y that of y over x (out_y = P_y value_x);
    HAS_X and HAS_Y say which of them has gradients. The masks are bits of 64 rows a word."""
    block = tl.program_id(0) % row_blocks
    head_index = tl.program_id(0) // row_blocks
    head = head_index % heads
    b = head_index // heads
    start_x = block * BLOCK_M
    b_i = tl.arange(0, BLOCK_M)
    b_j = tl.arange(0, BLOCK_N)
    b_x = start_x + b_i
    b_in_x = b_x < length_x
    first_x = wide(start_x)
    rows_x = wide(head_index) * length_x
    rows_y = wide(head_index) * length_y

    b_open_x = b_in_x
    if mask_x is not None:
        b_open_x = open_rows(mask_x, b, mask_x_words, start_x, BLOCK_M)
    b_lse_x = tl.load(logsumexp_x + rows_x + b_x, mask=b_in_x, other=-float("inf"))
    b_delta_x = tl.load(delta_x + rows_x + b_x, mask=b_in_x, other=0.0)
    b_live_x = b_lse_x != -float("inf")
    # What is neither attended to nor attends to anything is not read.
    p_qx = query_x + wide(b) * query_x_strides.batch + wide(head) * query_x_strides.head
    p_qx += first_x * query_x_strides.row
    b_qx = load_rows(p_qx, b_i, query_x_strides.row, b_open_x | b_live_x, HEAD_DIM, BLOCK_D, True, WIDE)
    p_vx = value_x + wide(b) * value_x_strides.batch + wide(head) * value_x_strides.head
    p_vx += first_x * value_x_strides.row
    b_vx = load_rows(p_vx, b_i, value_x_strides.row, b_open_x, DIM_X, BLOCK_X, True, WIDE)
    p_dox = grad_out_x + wide(b) * grad_out_x_strides.batch + wide(head) * grad_out_x_strides.head
    p_dox += first_x * grad_out_x_strides.row
    b_dox = load_rows(p_dox, b_i, grad_out_x_strides.row, b_live_x, DIM_Y, BLOCK_Y, True, WIDE)

    p_qy = query_y + wide(b) * query_y_strides.batch + wide(head) * query_y_strides.head
    p_vy = value_y + wide(b) * value_y_strides.batch + wide(head) * value_y_strides.head
    p_doy = grad_out_y + wide(b) * grad_out_y_strides.batch + wide(head) * grad_out_y_strides.head
    b_dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    b_dv = tl.zeros((BLOCK_M, BLOCK_X), tl.float32)
    for start_y in tl.range(0, length_y, BLOCK_N):
        first_y = wide(start_y)
        b_y = start_y + b_j
        b_in_y = b_y < length_y
        b_open_y = b_in_y
        if mask_y is not None:
            b_open_y = open_rows(mask_y, b, mask_y_words, start_y, BLOCK_N)
        b_lse_y = tl.load(logsumexp_y + rows_y + b_y, mask=b_in_y, other=-float("inf"))
        b_delta_y = tl.load(delta_y + rows_y + b_y, mask=b_in_y, other=0.0)
        b_live_y = b_lse_y != -float("inf")
        b_qy = load_rows(
            p_qy + first_y * query_y_strides.row,
            b_j,
            query_y_strides.row,
            b_open_y | b_live_y,
            HEAD_DIM,
            BLOCK_D,
            True,
            WIDE,
        )
        # [BM, BN]
        b_s = product(b_qx, tl.trans(b_qy), PRECISION) * scale_base2
        b_ds = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        if HAS_X:
            b_visible = b_open_y[None, :] & b_live_x[:, None]
            p_rows = p_vy + first_y * value_y_strides.row
            b_vy = load_rows(p_rows, b_j, value_y_strides.row, b_open_y, DIM_Y, BLOCK_Y, True, WIDE)
            b_p = tl.where(b_visible, tl.exp2(b_s - base2(b_lse_x)[:, None]), 0.0)
            b_p = dropped(b_p, dropout_x, head_index, b_x, start_y, BLOCK_N, False)
            b_dp = product(b_dox, tl.trans(b_vy), PRECISION)
            b_ds_x, _b_dqk = grad_scores(b_p, b_dp, b_delta_x[:, None], None, dropout_x, False)
            b_ds += b_ds_x
        if HAS_Y:
            b_seen = b_open_x[:, None] & b_live_y[None, :]
            p_rows = p_doy + first_y * grad_out_y_strides.row
            b_doy = load_rows(p_rows, b_j, grad_out_y_strides.row, b_live_y, DIM_X, BLOCK_X, True, WIDE)
            b_p_y = tl.where(b_seen, tl.exp2(b_s - base2(b_lse_y)[None, :]), 0.0)
            # To direction y the rows of x are keys.
            b_p_y = dropped(b_p_y, dropout_y, head_index, b_y, start_x, BLOCK_M, True)
            b_weight = b_p_y
            if dropout_y is not None:
                b_weight = tl.where(b_p_y > 0.0, b_p_y * dropout_y.keep_scale, 0.0)
            b_dp_y = product(b_vx, tl.trans(b_doy), PRECISION)
            b_ds_y, _b_dqk_y = grad_scores(b_p_y, b_dp_y, b_delta_y[None, :], None, dropout_y, False)
            b_ds += b_ds_y
            b_dv = product_add(round_to(b_weight, grad_out_y.dtype.element_ty), b_doy, b_dv, PRECISION)
        b_dq = product_add(round_to(b_ds, query_y.dtype.element_ty), b_qy, b_dq, PRECISION)
    if grad_query is not None:
        p_dq = grad_query + wide(b) * grad_query_strides.batch + wide(head) * grad_query_strides.head
        p_dq += first_x * grad_query_strides.row
        store_rows(p_dq, b_i, grad_query_strides.row, b_in_x, b_dq * scale, HEAD_DIM, BLOCK_D, WIDE)
    if grad_value is not None:
        p_dv = grad_value + wide(b) * grad_value_strides.batch + wide(head) * grad_value_strides.head
        p_dv += first_x * grad_value_strides.row
        store_rows(p_dv, b_i, grad_value_strides.row, b_in_x, b_dv, DIM_X, BLOCK_X, WIDE)
