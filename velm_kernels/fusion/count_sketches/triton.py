"""Count sketches by a Triton kernel: the launch."""

from __future__ import annotations

import torch

from velm_kernels.backends.triton import Config, launch
from velm_kernels.fusion.count_sketches.gathering import by_bucket
from velm_kernels.fusion.count_sketches.triton_kernels import count_sketch_kernel
from velm_kernels.triton.launches import cdiv

TILE = Config(4, 128, 4, 1)


def count_sketches_forward(
    x: torch.Tensor,
    index_x: torch.Tensor,
    sign_x: torch.Tensor,
    y: torch.Tensor,
    index_y: torch.Tensor,
    sign_y: torch.Tensor,
    dim: int,
    out: torch.Tensor,
) -> None:
    column_blocks = cdiv(dim, TILE.block_n)
    for rows, index, sign, to in ((x, index_x, sign_x, out[: len(x)]), (y, index_y, sign_y, out[len(x) :])):
        order, bounds = by_bucket(index, dim)
        arguments = (rows, order, bounds, sign, to, rows.stride(0), rows.shape[0], dim, column_blocks)
        constants = {"BLOCK_M": TILE.block_m, "BLOCK_N": TILE.block_n}
        grid = cdiv(rows.shape[0], TILE.block_m) * column_blocks
        launch("count_sketch", count_sketch_kernel, grid, arguments, constants, TILE)
