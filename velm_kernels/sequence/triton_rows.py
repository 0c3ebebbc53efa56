"""Rows by number, by Triton kernels: the launches that the operators which put features at tokens share."""

from __future__ import annotations

import torch
from torch import Tensor

from velm_kernels.backends.triton import Config, launch
from velm_kernels.sequence.places import text_by_id
from velm_kernels.sequence.triton_kernels import placed_rows_kernel, summed_rows_kernel
from velm_kernels.triton.launches import cdiv

TILE = Config(8, 256, 4, 1)
SUMS = Config(1, 512, 4, 1)


def put_rows(
    base: Tensor | None, ids: Tensor | None, features: Tensor | None, index: Tensor, out: Tensor, add: bool = False
) -> None:
    """Fills ``out`` as :func:`placed_rows_kernel` says."""
    rows, dim = out.shape
    strides = (0 if base is None else base.stride(0), 0 if features is None else features.stride(0))
    # Any number is one of a row where zeros stand in for the features.
    count = 2**31 - 1 if features is None else features.shape[0]
    dim_blocks = cdiv(dim, TILE.block_n)
    sizes = (rows, 0 if base is None else base.shape[0], count, dim, dim_blocks)
    constants = {"ADD": add, "BLOCK_M": TILE.block_m, "BLOCK_N": TILE.block_n}
    grid = cdiv(rows, TILE.block_m) * dim_blocks
    launch(
        "placed_rows", placed_rows_kernel, grid, (base, ids, features, index, out, *strides, *sizes), constants, TILE
    )


def sum_rows_of_text(grad: Tensor, ids: Tensor, index: Tensor, out: Tensor) -> None:
    """``out[id]`` = the sum of the rows of ``grad`` whose token has this id and takes no feature."""
    vocabulary, dim = out.shape
    out.zero_()
    keys, order = text_by_id(ids, index, vocabulary)
    ends = torch.searchsorted(keys, keys, right=True, out_int32=True)
    dim_blocks = cdiv(dim, SUMS.block_n)
    arguments = (grad, order, keys, ends, out, grad.stride(0), vocabulary, dim, dim_blocks)
    launch("summed_rows", summed_rows_kernel, ids.shape[0] * dim_blocks, arguments, {"BLOCK_N": SUMS.block_n}, SUMS)
