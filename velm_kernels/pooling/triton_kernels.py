"""What Triton kernels over squares of neighbouring tokens call."""

from __future__ import annotations

import triton
import triton.language as tl

from velm_kernels.triton.kernels import to_int64


@triton.jit
def first_tokens(windows, batch, b_row, b_some, rows, tokens, width, factor):
    """The first token of each square, -1 where there is none, and the width of its map."""
    if windows is not None:
        p_window = windows + (to_int64(batch) * rows + b_row) * 2
        b_first = tl.load(p_window, mask=b_some, other=-1)
        b_width = tl.load(p_window + 1, mask=b_some, other=0)
        # Whatever the numbers are, no memory but that of x is touched.
        b_end = to_int64(b_first) + (factor - 1) * to_int64(b_width) + factor
        b_inside = (b_first >= 0) & (b_width >= factor) & (b_end <= tokens)
        return tl.where(b_inside, b_first, -1), b_width
    else:
        across = width // factor
        b_first = (b_row // across) * (width * factor) + (b_row % across) * factor
        return tl.where(b_some, b_first, -1), tl.zeros_like(b_row) + width


@triton.jit
def place_of(blocks, dim_blocks, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The entry of this program, its squares and its features."""
    program = tl.program_id(0)
    b_row = ((program // dim_blocks) % blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    b_column = (program % dim_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    return program // (blocks * dim_blocks), b_row, b_column
