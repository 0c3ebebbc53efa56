"""Triton kernel of bidirectional attention's backward pass: the gradients of one side from shared scores."""

from __future__ import annotations

import triton
import triton.language as tl

from velm_kernels.attention.triton_kernels.products import (
    add_weighted,
    has_nan,
    of_seen,
    product_of_rows,
    report_nan,
    row_of,
    rows,
    store_rows,
    zero_pieces,
)
from velm_kernels.attention.triton_kernels.tiles import (
    LOWEST,
    grad_scores,
    kept_weights,
    open_rows,
    probabilities,
    unless_infinite,
)
from velm_kernels.triton.kernels import round_to, to_int64


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
    flags,
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
    row_blocks,
    HAS_X: tl.constexpr,
    HAS_Y: tl.constexpr,
    GUARDED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM_X: tl.constexpr,
    DIM_Y: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_Y: tl.constexpr,
    PARTS: tl.constexpr,
    INT64: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradients of query_x and value_x, one block of rows of x per program, from one pass over the scores with y.

    Direction x is attention of x over y (out_x = P_x value_y), direction y that of y over x (out_y = P_y value_x);
    HAS_X and HAS_Y say which of them has gradients, PARTS how many programs share the columns of a result. The masks
    are bits, 64 rows in a word.

    A row of x that y may not attend to sees the rows of y that mask_y shows and no others, but its tiles multiply the
    others by 0. Where that has made NaN (`report_nan`), a GUARDED launch, of direction x alone, reads what mask_y shows
    and replaces it."""
    if GUARDED:  # noqa: SIM102
        if not has_nan(flags, BLOCK_M):
            return
    part = tl.program_id(0) % PARTS
    rest = tl.program_id(0) // PARTS
    block = rest % row_blocks
    head_index = rest // row_blocks
    head = head_index % heads
    b = head_index // heads
    start_x = block * BLOCK_M
    b_i = tl.arange(0, BLOCK_M)
    b_j = tl.arange(0, BLOCK_N)
    b_x = start_x + b_i
    b_in_x = b_x < length_x
    rows_x = to_int64(head_index) * length_x
    rows_y = to_int64(head_index) * length_y

    b_open_x = b_in_x
    if mask_x is not None:
        b_open_x = open_rows(mask_x, b, mask_x_words, start_x, BLOCK_M)
    b_lse_x = tl.load(logsumexp_x + rows_x + b_x, mask=b_in_x, other=-float("inf"))
    b_delta_x = tl.load(delta_x + rows_x + b_x, mask=b_in_x, other=0.0)
    # The delta of a row that sees nothing but -inf is NaN.
    b_live_x = (b_lse_x != -float("inf")) | (b_delta_x != 0.0)
    # What is neither attended to nor attends to anything is not read.
    p_qx = row_of(query_x, query_x_strides, b, head, start_x)
    qx = rows(p_qx, b_i, query_x_strides.row, b_open_x | b_live_x, HEAD_DIM, BLOCK_D, INT64)
    p_vx = row_of(value_x, value_x_strides, b, head, start_x)
    vx = rows(p_vx, b_i, value_x_strides.row, b_open_x, DIM_X, BLOCK_X, INT64)
    p_dox = row_of(grad_out_x, grad_out_x_strides, b, head, start_x)
    dox = rows(p_dox, b_i, grad_out_x_strides.row, b_live_x, DIM_Y, BLOCK_Y, INT64)

    dq = zero_pieces(BLOCK_M, HEAD_DIM, BLOCK_D, PARTS)
    dv = zero_pieces(BLOCK_M, DIM_X, BLOCK_X, PARTS)
    for start_y in tl.range(0, length_y, BLOCK_N):
        b_y = start_y + b_j
        b_in_y = b_y < length_y
        b_open_y = b_in_y
        if mask_y is not None:
            b_open_y = open_rows(mask_y, b, mask_y_words, start_y, BLOCK_N)
        b_lse_y = tl.load(logsumexp_y + rows_y + b_y, mask=b_in_y, other=-float("inf"))
        b_delta_y = tl.load(delta_y + rows_y + b_y, mask=b_in_y, other=0.0)
        b_live_y = (b_lse_y != -float("inf")) | (b_delta_y != 0.0)
        b_read_y = b_in_y & False
        if HAS_X:
            b_read_y = b_open_y
        if HAS_Y:
            b_read_y = b_read_y | b_live_y
        p_qy = row_of(query_y, query_y_strides, b, head, start_y)
        qy = rows(p_qy, b_j, query_y_strides.row, b_read_y, HEAD_DIM, BLOCK_D, INT64)
        # [BM, BN]
        b_s = product_of_rows(qx, qy, HEAD_DIM, BLOCK_D, PRECISION) * scale
        b_ds = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        if HAS_X and (grad_query is not None):
            b_s_x = tl.where(b_open_y[None, :] & b_live_x[:, None], b_s, LOWEST)
            p_vy = row_of(value_y, value_y_strides, b, head, start_y)
            vy = rows(p_vy, b_j, value_y_strides.row, b_open_y, DIM_Y, BLOCK_Y, INT64)
            b_log_x = unless_infinite(b_lse_x)[:, None]
            b_p = probabilities(
                b_s_x, b_log_x, b_log_x, dropout_x, head_index, b_x, start_y, False, True, BLOCK_N, False
            )
            b_dp = product_of_rows(dox, vy, DIM_Y, BLOCK_Y, PRECISION)
            b_ds += grad_scores(b_p, b_dp, b_delta_x[:, None], dropout_x, True)
        if HAS_Y:
            b_s_y = tl.where(b_open_x[:, None] & b_live_y[None, :], b_s, LOWEST)
            p_doy = row_of(grad_out_y, grad_out_y_strides, b, head, start_y)
            doy = rows(p_doy, b_j, grad_out_y_strides.row, b_live_y, DIM_X, BLOCK_X, INT64)
            # To direction y the rows of x are keys.
            b_log_y = unless_infinite(b_lse_y)[None, :]
            b_p_y = probabilities(
                b_s_y, b_log_y, b_log_y, dropout_y, head_index, b_y, start_x, False, True, BLOCK_M, True
            )
            if grad_query is not None:
                b_dp_y = product_of_rows(vx, doy, DIM_X, BLOCK_X, PRECISION)
                b_ds += grad_scores(b_p_y, b_dp_y, b_delta_y[None, :], dropout_y, True)
            if grad_value is not None:
                b_weight = round_to(kept_weights(b_p_y, dropout_y), grad_out_y.dtype.element_ty)
                dv = add_weighted(dv, None, b_weight, doy, part, DIM_X, BLOCK_X, PARTS, PRECISION)
        if grad_query is not None:
            b_ds = round_to(b_ds, query_y.dtype.element_ty)
            dq = add_weighted(dq, None, b_ds, qy, part, HEAD_DIM, BLOCK_D, PARTS, PRECISION)
    if mask_x is not None:
        dq, dv = of_seen(dq, b_open_x | b_live_x), of_seen(dv, b_open_x)
    if grad_query is not None:
        b_stored = b_in_x
        if GUARDED:
            b_stored = b_in_x & (b_open_x == 0)
        elif flags is not None:
            report_nan(flags, dq, BLOCK_M)
        p_dq = row_of(grad_query, grad_query_strides, b, head, start_x)
        stride = grad_query_strides.row
        store_rows(p_dq, b_i, stride, b_stored, dq, scale, part, GUARDED, HEAD_DIM, BLOCK_D, PARTS, INT64)
    if grad_value is not None:
        p_dv = row_of(grad_value, grad_value_strides, b, head, start_x)
        store_rows(p_dv, b_i, grad_value_strides.row, b_in_x, dv, 1.0, part, False, DIM_X, BLOCK_X, PARTS, INT64)
