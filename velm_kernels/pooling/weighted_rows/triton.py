"""weighted_rows by Triton kernels: the launches."""

from __future__ import annotations

import torch
from torch import Tensor

from velm_kernels.backends.triton import Config, launch
from velm_kernels.pooling.weighted_rows.triton_kernels import tap_dots_kernel, weighted_rows_kernel
from velm_kernels.triton.launches import cdiv

TILE = Config(8, 256, 4, 1)
DOTS = Config(16, 128, 4, 1)


def weighted_rows_forward(x: Tensor, indices: Tensor, weights: Tensor, out: Tensor) -> None:
    _sum("weighted_rows", x, indices, None, weights, indices.shape[1], out)


def weighted_rows_backward(
    grad: Tensor,
    x: Tensor | None,
    indices: Tensor,
    weights: Tensor | None,
    rows: int,
    grad_x: Tensor | None,
    grad_weights: Tensor | None,
) -> None:
    if grad_x is not None and weights is not None:
        # For each row of the table what read it, in order: nothing is added by two programs.
        taps = indices.shape[1]
        keys = indices.reshape(-1)
        keys, order = torch.where((keys >= 0) & (keys < rows), keys, rows).sort(stable=True)
        row = torch.arange(rows + 1, dtype=keys.dtype, device=keys.device)
        offsets = torch.searchsorted(keys, row, out_int32=True)
        results = (order // max(taps, 1)).int()
        _sum("weighted_rows_backward", grad, results, offsets, weights.reshape(-1)[order], 0, grad_x)
    if grad_weights is not None and x is not None:
        batch, rows, dim = x.shape
        entries, taps = indices.numel(), indices.shape[1]
        strides = (grad.stride(0), grad.stride(1), x.stride(0), x.stride(1))
        arguments = (grad, x, indices, grad_weights, *strides, batch, rows, entries, taps, dim)
        constants = {"BLOCK_M": DOTS.block_m, "BLOCK_N": DOTS.block_n}
        launch("tap_dots", tap_dots_kernel, cdiv(entries, DOTS.block_m), arguments, constants, DOTS)


def _sum(name: str, x: Tensor, index: Tensor, offsets: Tensor | None, weight: Tensor, taps: int, out: Tensor) -> None:
    batch, out_rows, dim = out.shape
    blocks, dim_blocks = cdiv(out_rows, TILE.block_m), cdiv(dim, TILE.block_n)
    sizes = (x.shape[1], taps, out_rows, dim, blocks, dim_blocks)
    arguments = (x, out, index, offsets, weight, x.stride(0), x.stride(1), *sizes)
    constants = {"BLOCK_M": TILE.block_m, "BLOCK_N": TILE.block_n}
    launch(name, weighted_rows_kernel, batch * blocks * dim_blocks, arguments, constants, TILE)
