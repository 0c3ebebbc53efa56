"""Squares of neighbouring tokens by Triton kernels: the sizes of launches over them."""

from __future__ import annotations

from torch import Tensor

from velm_kernels.backends.triton import Config
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
