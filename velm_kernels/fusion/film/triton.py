"""film by Triton kernels: the launches."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from velm_kernels.backends.triton import Config, launch
from velm_kernels.fusion.film.triton_kernels import (
    film_along_backward_kernel,
    film_backward_kernel,
    film_kernel,
)
from velm_kernels.triton.launches import cdiv, sum_partials

TILE = Config(8, 256, 4, 1)
# Beside the tile, backward keeps the sums of gamma and of beta.
BACKWARD = replace(TILE, num_warps=8)
CONSTANTS = {"BLOCK_M": TILE.block_m, "BLOCK_N": TILE.block_n}


def film_forward(
    x: Tensor, gamma: Tensor, beta: Tensor, regions_contiguous: bool, gamma_offset: float, out: Tensor
) -> None:
    batch, rows, columns = x.shape
    stride = x.stride(1)
    if regions_contiguous:
        rows, columns, stride = columns, rows, x.stride(2)
    row_blocks, column_blocks = cdiv(rows, TILE.block_m), cdiv(columns, TILE.block_n)
    strides = (x.stride(0), stride, gamma.stride(0), beta.stride(0))
    arguments = (x, gamma, beta, out, *strides, gamma_offset, rows, columns, row_blocks, column_blocks)
    grid = batch * row_blocks * column_blocks
    launch("film", film_kernel, grid, arguments, {"ALONG": regions_contiguous, **CONSTANTS}, TILE)


def film_backward(
    grad: Tensor,
    x: Tensor | None,
    gamma: Tensor | None,
    regions_contiguous: bool,
    gamma_offset: float,
    grad_x: Tensor | None,
    grad_gamma: Tensor | None,
    grad_beta: Tensor | None,
) -> None:
    batch, regions, dim = grad.shape
    x, gamma = x if grad_gamma is not None else None, gamma if grad_x is not None else None
    across = 2 if regions_contiguous else 1
    strides = (
        0 if x is None else x.stride(0),
        0 if x is None else x.stride(across),
        0 if gamma is None else gamma.stride(0),
        gamma_offset,
    )
    if regions_contiguous:
        arguments = (grad, x, gamma, grad_x, grad_gamma, grad_beta, *strides, batch * dim, regions, dim)
        grid = cdiv(batch * dim, TILE.block_m)
        launch("film_along_backward", film_along_backward_kernel, grid, arguments, CONSTANTS, TILE)
        return
    steps = 4 if regions > TILE.block_m else 1
    row_blocks, column_blocks = cdiv(regions, steps * TILE.block_m), cdiv(dim, TILE.block_n)
    parts = [
        None if to is None else grad.new_empty((row_blocks, batch, dim), dtype=torch.float32)
        for to in (grad_gamma, grad_beta)
    ]
    sizes = (batch, regions, dim, row_blocks, column_blocks)
    launch(
        "film_backward",
        film_backward_kernel,
        batch * row_blocks * column_blocks,
        (grad, x, gamma, grad_x, *parts, *strides, *sizes),
        {"STEPS": steps, **CONSTANTS},
        BACKWARD,
    )
    for part, to in zip(parts, (grad_gamma, grad_beta), strict=True):
        if part is not None and to is not None:
            sum_partials(part, to)
