"""match_rows by Triton kernels: the launches."""

from __future__ import annotations

import torch
from torch import Tensor

from velm_kernels.backends.triton import Config, launch, precision
from velm_kernels.pooling.match_rows.triton_kernels import inverse_norms_kernel, match_rows_kernel
from velm_kernels.triton.launches import cdiv

NORMS_TILE, NORMS_DEPTH = Config(32, 0, 4, 1), 64
# Of half precision and of float32, with the depth of a step.
TILES = {2: (Config(64, 64, 4, 2), 64), 4: (Config(64, 32, 8, 1), 32)}


def match_rows_forward(a: Tensor, b: Tensor, similarity: Tensor, best: Tensor) -> None:
    batch, rows, dim = a.shape
    norms = []
    for x in (a, b):
        norm = x.new_empty(x.shape[:2], dtype=torch.float32)
        norms.append(norm)
        of_norms = cdiv(x.shape[1], NORMS_TILE.block_m)
        norm_arguments = (x, norm, x.stride(0), x.stride(1), x.shape[1], dim, of_norms)
        sizes = {"BLOCK_M": NORMS_TILE.block_m, "BLOCK_D": NORMS_DEPTH}
        launch("inverse_norms", inverse_norms_kernel, batch * of_norms, norm_arguments, sizes, NORMS_TILE)
    tile, depth = TILES[a.element_size()]
    blocks = cdiv(rows, tile.block_m)
    strides = (a.stride(0), a.stride(1), b.stride(0), b.stride(1))
    arguments = (a, b, *norms, similarity, best, *strides, rows, b.shape[1], dim, blocks)
    constants = {
        "PRECISION": precision(a.dtype),
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_D": depth,
    }
    launch("match_rows", match_rows_kernel, batch * blocks, arguments, constants, tile)
