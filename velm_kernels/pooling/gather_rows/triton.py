"""gather_rows by a Triton kernel: the launch."""

from __future__ import annotations

from torch import Tensor

from velm_kernels.backends.triton import Config, launch
from velm_kernels.pooling.gather_rows.triton_kernels import gather_rows_kernel
from velm_kernels.triton.launches import cdiv

TILE = Config(8, 256, 4, 1)


def gather_rows_forward(
    x: Tensor,
    index: Tensor,
    offsets: Tensor | None,
    weight: Tensor | None,
    back_index: Tensor,
    back_offsets: Tensor | None,
    back_weight: Tensor | None,
    out: Tensor,
) -> None:
    batch, rows, dim = x.shape
    out_rows = out.shape[1]
    blocks, dim_blocks = cdiv(out_rows, TILE.block_m), cdiv(dim, TILE.block_n)
    sizes = (rows, index.shape[1], out_rows, dim, blocks, dim_blocks)
    arguments = (x, out, index, offsets, weight, x.stride(0), x.stride(1), *sizes)
    constants = {"BLOCK_M": TILE.block_m, "BLOCK_N": TILE.block_n}
    launch("gather_rows", gather_rows_kernel, batch * blocks * dim_blocks, arguments, constants, TILE)
