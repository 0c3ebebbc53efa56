"""Squares of neighbouring tokens by Triton kernels: where they lie, and the sizes of launches over them."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from velm_kernels.backends.triton import Config
from velm_kernels.triton.kernels import to_int64
from velm_kernels.triton.launches import cdiv

TILE = Config(8, 256, 4, 1)
CONSTANTS = {"BLOCK_M": TILE.block_m, "BLOCK_N": TILE.block_n}


def sizes_of(batch: int, rows: int, dim: int) -> tuple[int, tuple[int, int]]:
    """How many programs there are for ``rows`` squares of each entry, and of how many blocks one entry is."""
    blocks = cdiv(rows, TILE.block_m), cdiv(dim, TILE.block_n)
    return batch * blocks[0] * blocks[1], blocks


def leaves_out(windows: Tensor | None, height: int, width: int, factor: int) -> bool:
    """Whether there may be tokens in no square."""
    return windows is not None or height % factor != 0 or width % factor != 0


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
