"""low_rank_fusion by Triton kernels: the launches, for tensors in canonical form, and the products after them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from velm_kernels.attention.triton_problem import cdiv
from velm_kernels.backends.triton import Config, architecture, launch, precision
from velm_kernels.fusion.reference import with_one
from velm_kernels.fusion.triton_low_rank_kernels import low_rank_gradients_kernel, low_rank_kernel

MODALITIES = 4
TILE = Config(64, 64, 8, 2)
# What the registers hold where float32 is multiplied by three products of mma.sync.
NARROW = Config(32, 32, 8, 2)
# Where the products are summed in tensor memory, and the compiler allows a block of eight warps half of the registers.
FEWER_WARPS = Config(64, 32, 4, 2)
# Small tiles for the interpreter, so that small tests cross many of their edges.
SMALL = Config(16, 16, 4, 1)
# Steps of depth at a time, by element size.
STEP = {2: 64, 4: 32}
# Numbers of the gradients of one modality's projections that exist at a time, unless those of one rank are more.
WORKSPACE = 1 << 24


def _config(x: Tensor, backward: bool = False) -> tuple[Config, dict[str, Any]]:
    arch = architecture(x.device)
    config = SMALL if arch == 0 else NARROW if x.dtype == torch.float32 else TILE
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


def _split(kept: Tensor, xs: tuple[Tensor | None, ...], factor0: Tensor) -> list[Tensor | None]:
    """The projections of each modality, (rank, rows of m, out)."""
    if kept.numel() == 0:
        return [None] * MODALITIES
    rank, _, out = factor0.shape
    sizes = [0 if x is None else x.shape[0] * rank * out for x in xs]
    return [part if size else None for part, size in zip(kept.split(sizes), sizes, strict=True)]


def low_rank_fusion_forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    """`velm::low_rank_fusion_forward` by a Triton kernel."""
    *tensors, weight, bias, rows, save = arguments
    xs, factors = tuple(tensors[:MODALITIES]), tuple(tensors[MODALITIES:])
    rank, _, out = factors[0].shape
    config, constants = _config(xs[0])
    numbers = sum(x.shape[0] for x in xs if x is not None) * rank * out if save else 0
    kept = xs[0].new_empty((numbers,), dtype=torch.float32)
    result = xs[0].new_empty((rows, out))
    row_blocks = cdiv(rows, config.block_m)
    given = (
        *xs,
        *factors,
        *_split(kept, xs, factors[0]),
        weight,
        bias,
        result,
        *_sizes(xs, rows),
        rows,
        out,
        rank,
        row_blocks,
    )
    launch("low_rank", low_rank_kernel, row_blocks * cdiv(out, config.block_n), given, constants, config)
    return result, kept


def low_rank_fusion_backward(grad: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    """`velm::low_rank_fusion_backward`: a kernel for the gradients of the projections of some ranks at a time, whose
    products with the inputs and the factors are torch's."""
    *tensors, weight, kept, rows, grad_mask = arguments
    xs, factors = tuple(tensors[:MODALITIES]), tuple(tensors[MODALITIES:])
    rank, _, out = factors[0].shape
    config, constants = _config(grad, backward=True)
    row_blocks, out_blocks = cdiv(rows, config.block_m), cdiv(out, config.block_n)
    wants_x, wants_factor = ([bool(grad_mask >> bit & 1) for bit in range(first, first + 4)] for first in (0, 4))
    grads_x = [
        x.new_zeros(x.shape, dtype=torch.float32) if want and x is not None else grad.new_empty((0,))
        for x, want in zip(xs, wants_x, strict=True)
    ]
    grads_factor = [
        torch.zeros_like(factor) if want and factor is not None else grad.new_empty((0,))
        for factor, want in zip(factors, wants_factor, strict=True)
    ]
    partial = grad.new_zeros((rank, row_blocks * out_blocks), dtype=torch.float32)
    step = max(1, WORKSPACE // max(1, rows * out))
    for first in range(0, rank if grad_mask & 511 and partial.numel() else 0, step):
        ranks = min(step, rank - first)
        gradients = [
            grad.new_empty((rows, ranks * out)) if x is not None and (wants_x[m] or wants_factor[m]) else None
            for m, x in enumerate(xs)
        ]
        given = (
            grad,
            *xs,
            *factors,
            *_split(kept, xs, factors[0]),
            weight,
            *gradients,
            partial[first:],
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
        part = slice(first, first + ranks)
        for m, gradient in enumerate(gradients):
            if gradient is None:
                continue
            gradient = _of_rows(gradient, xs[m].shape[0])
            if wants_x[m]:
                # (ranks, dim, out) -> (ranks * out, dim)
                factor = factors[m][part, 1:].transpose(1, 2).flatten(0, 1)
                grads_x[m] += gradient @ factor.to(gradient.dtype)
            if wants_factor[m]:
                # (1 + dim, ranks * out) -> (ranks, 1 + dim, out)
                product = with_one(xs[m].to(gradient.dtype)).t() @ gradient
                grads_factor[m][part] = product.unflatten(1, (ranks, out)).transpose(0, 1)
    return (
        *(g.to(grad.dtype) for g in grads_x),
        *grads_factor,
        partial.sum(1).to(grad.dtype) if grad_mask & 256 else grad.new_empty((0,)),
        grad.sum(0, dtype=torch.float32).to(grad.dtype) if grad_mask & 512 else grad.new_empty((0,)),
    )


def _of_rows(gradient: Tensor, rows: int) -> Tensor:
    """Summed over the rows of the result that a row of x serves; in a type that the device multiplies in float32."""
    repeat = gradient.shape[0] // rows
    dtype = gradient.dtype if gradient.is_cuda else torch.float32
    if repeat == 1:
        return gradient.to(dtype)
    return gradient.unflatten(0, (rows, repeat)).sum(1, dtype=torch.float32).to(dtype)
