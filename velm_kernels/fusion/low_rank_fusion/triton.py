"""low_rank_fusion by Triton kernels: the launches, for tensors in canonical form."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from velm_kernels.backends.triton import Config, architecture, launch, precision
from velm_kernels.fusion.inputs import MOST_INPUTS
from velm_kernels.fusion.low_rank_fusion import products
from velm_kernels.fusion.low_rank_fusion.op import split
from velm_kernels.fusion.low_rank_fusion.triton_kernels import (
    low_rank_gradients_kernel,
    low_rank_kernel,
    low_rank_projection_kernel,
)
from velm_kernels.triton.launches import cdiv

TILE = Config(64, 64, 8, 2)
# What the registers hold where float32 is multiplied by three products of mma.sync.
FEW_REGISTERS = Config(32, 32, 8, 1)
# Where the products are summed in tensor memory, and the compiler allows a block of eight warps half of the registers.
FEWER_WARPS = Config(64, 32, 4, 2)
# Small tiles for the interpreter, so that small tests cross many of their edges.
SMALL = Config(16, 16, 4, 1)
# Steps of depth at a time, by element size.
STEP = {2: 64, 4: 32}


def _config(x: Tensor, backward: bool = False) -> tuple[Config, dict[str, Any]]:
    arch = architecture(x.device)
    config = SMALL if arch == 0 else FEW_REGISTERS if x.dtype == torch.float32 else TILE
    if arch == 100 and config is TILE and backward:
        config = FEWER_WARPS
    return config, {
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": 16 if arch == 0 else STEP[x.dtype.itemsize],
        "PRECISION": precision(x.dtype),
    }


def _sizes(xs: tuple[Tensor | None, ...], rows: int) -> tuple[int, ...]:
    """Row strides, features, and for how many rows of the result one of x serves."""
    strides = (0 if x is None else x.stride(0) for x in xs)
    dims = (0 if x is None else x.shape[1] for x in xs)
    repeats = (1 if x is None else rows // max(1, x.shape[0]) for x in xs)
    return (*strides, *dims, *repeats)


def low_rank_fusion_forward(*arguments: Any) -> None:
    """By a Triton kernel, after another for inputs with one row for several."""
    products.forward(_forward, *arguments)


def _forward(*arguments: Any) -> None:
    *tensors, weight, bias, rows, _, result, kept = arguments
    xs, factors = tuple(tensors[:MOST_INPUTS]), tensors[MOST_INPUTS:]
    rank, _, out = factors[0].shape
    config, constants = _config(xs[0])
    out_blocks = cdiv(out, config.block_n)
    projections = split(kept, xs, factors[0])
    for m, x in enumerate(xs):
        if x is None or x.shape[0] == rows:
            continue
        if projections[m] is None:
            projections[m] = xs[0].new_empty((rank, x.shape[0], out), dtype=torch.float32)
        row_blocks = cdiv(x.shape[0], config.block_m)
        sizes = (x.stride(0), x.shape[1], x.shape[0], out, row_blocks, out_blocks)
        grid = row_blocks * out_blocks * rank
        given = (x, factors[m], projections[m], *sizes)
        launch("low_rank_projection", low_rank_projection_kernel, grid, given, constants, config)
        factors[m] = None
    row_blocks = cdiv(rows, config.block_m)
    given = (*xs, *factors, *projections, weight, bias, result, *_sizes(xs, rows), rows, out, rank, row_blocks)
    launch("low_rank", low_rank_kernel, row_blocks * out_blocks, given, constants, config)


def low_rank_fusion_backward(grad: Tensor, *arguments: Any) -> None:
    """A kernel for the gradients of the projections of some ranks at a time, whose products with the inputs and the
    factors are torch's."""
    xs, factors, (weight, kept, rows) = arguments[:MOST_INPUTS], arguments[MOST_INPUTS:8], arguments[8:11]
    out = factors[0].shape[2]
    config, constants = _config(grad, backward=True)
    row_blocks, out_blocks = cdiv(rows, config.block_m), cdiv(out, config.block_n)

    def gradients_of(first: int, ranks: int, wanted: list[bool]) -> tuple[list[Tensor | None], Tensor]:
        gradients = [grad.new_empty((rows, ranks * out)) if want else None for want in wanted]
        partial = grad.new_empty((ranks, row_blocks * out_blocks), dtype=torch.float32)
        given = (
            grad,
            *xs,
            *factors,
            *split(kept, xs, factors[0]),
            weight,
            *gradients,
            partial,
            *_sizes(xs, rows),
            rows,
            out,
            first,
            ranks,
            row_blocks,
            out_blocks,
        )
        grid = row_blocks * out_blocks * ranks
        launch("low_rank_gradients", low_rank_gradients_kernel, grid, given, constants, config)
        return gradients, partial.sum(1)

    products.backward(gradients_of, grad, *arguments)
