"""Matrix products of the Triton attention kernels, and the rows that they multiply.

Rows of up to `BLOCK` columns are read once and held in registers. Wider ones are read piece by piece, `BLOCK` columns
at a time, in each product anew, and sums of such rows are a tuple of pieces. A float32 product is three of TF32, whose
operands are there twice; and the operand that is the same in every step of a loop would stay in registers so.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from velm_kernels.triton.kernels import product, product_add, round_to, to_int64


class Loaded(NamedTuple):
    """Rows of a matrix [rows, BLOCK], read."""

    b_x: Any


class Unread(NamedTuple):
    """Rows of row-major matrices, each `b_offset` elements behind `p`. Those that are not `b_ok` are not read and count
    as zeros."""

    p: Any
    b_offset: Any
    b_ok: Any


@triton.constexpr_function
def part_of(width, block, parts):
    """Columns of a result of `width` columns that each of `parts` programs sums: whole pieces, unless it sums all."""
    return width if parts == 1 else block * -(-width // (block * parts))


@triton.jit
def load_piece(p_x, b_offset, b_ok, first, WIDTH: tl.constexpr, WHOLE: tl.constexpr, BLOCK: tl.constexpr):
    """Columns from `first` on of rows of `WIDTH`, zeros behind them; WHOLE: there are as many. -> [rows, BLOCK]"""
    b_column = first + tl.arange(0, BLOCK)
    p_piece = p_x + b_offset[:, None] + b_column[None, :]
    if WHOLE:
        return tl.load(p_piece, mask=b_ok[:, None], other=0.0)
    else:
        return tl.load(p_piece, mask=b_ok[:, None] & (b_column < WIDTH)[None, :], other=0.0)


@triton.jit
def rows_at(p_x, b_offset, b_ok, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """The rows of `WIDTH` columns that start at `b_offset`: `Loaded`, or `Unread` where they are wider than BLOCK."""
    if WIDTH > BLOCK:
        return Unread(p_x, b_offset, b_ok)
    else:
        return Loaded(load_piece(p_x, b_offset, b_ok, 0, WIDTH, WIDTH == BLOCK, BLOCK))


@triton.jit
def rows(p_x, b_row, stride_row, b_ok, WIDTH: tl.constexpr, BLOCK: tl.constexpr, INT64: tl.constexpr):
    """The rows number `b_row` of a matrix at `p_x`. INT64: their offsets need 64 bits."""
    if INT64:
        b_row = b_row.to(tl.int64)
    return rows_at(p_x, b_row * stride_row, b_ok, WIDTH, BLOCK)


@triton.jit
def product_of_rows(x, y, WIDTH: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr):
    """Scalar products of the rows `x` and `y`. -> [rows of x, rows of y]"""
    if WIDTH > BLOCK:
        WHOLE: tl.constexpr = WIDTH % BLOCK == 0
        b_sum = tl.zeros((x.b_offset.shape[0], y.b_offset.shape[0]), tl.float32)
        # A loop of the device: unrolled, the pieces that do not change would be kept.
        for first in tl.range(0, WIDTH, BLOCK):
            b_x = load_piece(x.p, x.b_offset, x.b_ok, first, WIDTH, WHOLE, BLOCK)
            b_y = load_piece(y.p, y.b_offset, y.b_ok, first, WIDTH, WHOLE, BLOCK)
            b_sum = product_add(b_x, tl.trans(b_y), b_sum, PRECISION)
        return b_sum
    else:
        return product(x.b_x, tl.trans(y.b_x), PRECISION)


@triton.jit
def row_of(x, strides, b, head, row):
    """Pointer to a row of (batch, heads, rows, columns)."""
    return x + to_int64(b) * strides.batch + to_int64(head) * strides.head + to_int64(row) * strides.row


@triton.jit
def zero_pieces(ROWS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr):
    """Sums of rows to begin with. -> tuple of [ROWS, BLOCK]"""
    pieces = ()
    for _ in tl.static_range(0, part_of(WIDTH, BLOCK, PARTS), BLOCK):
        pieces += (tl.zeros((ROWS, BLOCK), tl.float32),)
    return pieces


@triton.jit
def add_weighted(
    sums,
    b_decay,
    b_weight,
    x,
    part,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`sums`, times `b_decay` where that is not None, plus the rows `x` summed with `b_weight` [sums, rows of x]; of
    all columns this `part`."""
    PART: tl.constexpr = part_of(WIDTH, BLOCK, PARTS)
    pieces = ()
    for i in tl.static_range(len(sums)):
        b_sum = sums[i]
        if b_decay is not None:
            b_sum = b_sum * b_decay
        if WIDTH > BLOCK:
            first = part * PART + i * BLOCK
            b_x = load_piece(x.p, x.b_offset, x.b_ok, first, WIDTH, (WIDTH % PART == 0) and (PART % BLOCK == 0), BLOCK)
        else:
            b_x = x.b_x
        pieces += (product_add(b_weight, b_x, b_sum, PRECISION),)
    return pieces


@triton.jit
def _one_by_one(b_sum, b_weight, b_seen, b_x):
    """`b_sum` plus `b_weight` @ `b_x`, where each sum has the terms that it sees and no others."""
    b_j = tl.arange(0, b_x.shape[0])
    for j in tl.range(0, b_x.shape[0]):
        b_column = (b_j == j)[None, :]
        b_w = tl.sum(tl.where(b_column, b_weight.to(tl.float32), 0.0), 1)
        b_sees = tl.max((b_column & b_seen).to(tl.int32), 1) != 0
        b_row = tl.sum(tl.where((b_j == j)[:, None], b_x.to(tl.float32), 0.0), 0)
        b_sum = tl.where(b_sees[:, None], b_sum + b_w[:, None] * b_row[None, :], b_sum)
    return b_sum


@triton.jit
def add_seen(
    sums,
    b_decay,
    b_weight,
    b_seen,
    x,
    part,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`add_weighted` of the rows that each sum sees, `b_seen` [sums, rows of x], and of no others: weights of 0 do not
    silence what is not finite. Where there is such a number in the tile, its rows are added one by one."""
    PART: tl.constexpr = part_of(WIDTH, BLOCK, PARTS)
    b_wanted = tl.max(b_seen.to(tl.int32), 0) != 0
    pieces = ()
    for i in tl.static_range(len(sums)):
        b_sum = sums[i]
        if b_decay is not None:
            b_sum = b_sum * b_decay
        if WIDTH > BLOCK:
            first = part * PART + i * BLOCK
            b_x = load_piece(x.p, x.b_offset, x.b_ok, first, WIDTH, (WIDTH % PART == 0) and (PART % BLOCK == 0), BLOCK)
        else:
            b_x = x.b_x
        b_x = tl.where(b_wanted[:, None], b_x, 0.0)
        b_special = ((b_x - b_x) != 0.0).to(tl.int32)
        if tl.max(tl.max(b_special, 1), 0) != 0:
            b_sum = _one_by_one(b_sum, b_weight, b_seen, b_x)
        else:
            b_sum = product_add(b_weight, b_x, b_sum, PRECISION)
        pieces += (b_sum,)
    return pieces


@triton.jit
def of_seen(pieces, b_seen):
    """`pieces`, but zeros in rows that are not `b_seen`: what they do not see, multiplied with 0, may have been NaN."""
    kept = ()
    for i in tl.static_range(len(pieces)):
        kept += (tl.where(b_seen[:, None], pieces[i], 0.0),)
    return kept


@triton.jit
def store_pieces(
    p_x,
    b_offset,
    b_ok,
    pieces,
    b_scale,
    part,
    ONLY_NAN: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Writes `pieces` times `b_scale`, rounded, to this `part` of the rows that start at `b_offset`. ONLY_NAN: where
    there is NaN already, and nowhere else."""
    PART: tl.constexpr = part_of(WIDTH, BLOCK, PARTS)
    for i in tl.static_range(len(pieces)):
        b_column = part * PART + i * BLOCK + tl.arange(0, BLOCK)
        b_in = b_ok[:, None]
        if (WIDTH % PART != 0) or (PART % BLOCK != 0):
            b_in = b_in & (b_column < WIDTH)[None, :]
        p_piece = p_x + b_offset[:, None] + b_column[None, :]
        if ONLY_NAN:
            # In float32, because Triton's interpreter compares the bits of bfloat16, and NaN has the bits of itself.
            b_before = tl.load(p_piece, mask=b_in, other=0.0).to(tl.float32)
            b_in = b_in & (b_before != b_before)
        tl.store(p_piece, round_to(pieces[i] * b_scale, p_x.dtype.element_ty), mask=b_in)


@triton.jit
def store_rows(
    p_x,
    b_row,
    stride_row,
    b_ok,
    pieces,
    b_scale,
    part,
    ONLY_NAN: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
    INT64: tl.constexpr,
):
    """The same, to the rows number `b_row`."""
    if INT64:
        b_row = b_row.to(tl.int64)
    store_pieces(p_x, b_row * stride_row, b_ok, pieces, b_scale, part, ONLY_NAN, WIDTH, BLOCK, PARTS)


@triton.jit
def report_nan(flags, pieces, ROWS: tl.constexpr):
    """What a row of a tile does not see may be NaN or infinite, which its weight of 0 does not silence. To look for
    that in every tile would cost more than all masks together; so a block with NaN in its result only says so in
    `flags`, for each of its rows, and a GUARDED launch does it again (`add_seen`) and replaces what is NaN. A number
    for the whole block would be reduced twice, and what comes from tensor memory Triton 3.6 reduces but once."""
    b_nan = tl.zeros((ROWS,), tl.int32)
    for i in tl.static_range(len(pieces)):
        b_nan = b_nan | tl.max((pieces[i] != pieces[i]).to(tl.int32), 1)
    tl.store(flags + to_int64(tl.program_id(0)) * ROWS + tl.arange(0, ROWS), b_nan.to(tl.int8))


@triton.jit
def has_nan(flags, ROWS: tl.constexpr):
    """Whether this program has reported NaN."""
    return tl.max(tl.load(flags + to_int64(tl.program_id(0)) * ROWS + tl.arange(0, ROWS)).to(tl.int32), 0) != 0
