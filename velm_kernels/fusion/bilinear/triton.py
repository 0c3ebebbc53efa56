"""bilinear by Triton kernels: the launches, for tensors in canonical form."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from velm_kernels.backends.triton import Config, architecture, launch, precision
from velm_kernels.fusion.bilinear.triton_kernels import bilinear_inputs_kernel, bilinear_kernel, bilinear_weight_kernel
from velm_kernels.triton.launches import FEW_PROGRAMS, cdiv, sum_partials

TILE = Config(64, 64, 8, 2)
# What the registers hold where float32 is multiplied by three products of mma.sync, and where they are fewest.
FEW_REGISTERS = Config(32, 32, 4, 2)
# Small tiles for the interpreter, so that small tests cross many of their edges.
SMALL = Config(16, 16, 4, 1)
# Steps of depth at a time, by element size.
STEP = {2: 64, 4: 32}
# Sums of one element are kept in this many parts at the most.
PARTS = 32


def _config(x: Tensor, backward: bool = False) -> tuple[Config, dict[str, object]]:
    arch = architecture(x.device)
    interpreted = arch == 0
    config = SMALL if interpreted else TILE
    if (arch in (80, 120) and x.dtype == torch.float32) or (arch == 120 and backward):
        config = FEW_REGISTERS
    return config, {
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": 16 if interpreted else STEP[x.dtype.itemsize],
        "PRECISION": precision(x.dtype),
    }


def _parts(programs: int, dx: int) -> tuple[int, int]:
    """Into how many parts of how many rows i the sum over x is split, so that there is work for a whole device."""
    steps = max(1, cdiv(dx, max(1, min(PARTS, FEW_PROGRAMS // max(1, programs)))))
    return cdiv(dx, steps), steps


def bilinear_forward(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None, result: Tensor) -> None:
    """By a Triton kernel; its parts are added by another."""
    (rows, dx), dy, out = x.shape, y.shape[1], weight.shape[0]
    config, constants = _config(x)
    row_blocks, out_blocks = cdiv(rows, config.block_m), cdiv(out, config.block_n)
    parts, steps = _parts(row_blocks * out_blocks, dx)
    partial = x.new_empty((parts, rows, out), dtype=torch.float32)
    arguments = (
        x,
        y,
        weight,
        partial,
        x.stride(0),
        y.stride(0),
        weight.stride(0),
        weight.stride(1),
        rows,
        out,
        dx,
        dy,
        row_blocks,
        out_blocks,
        steps,
    )
    launch("bilinear", bilinear_kernel, row_blocks * out_blocks * parts, arguments, constants, config)
    if bias is None:
        sum_partials(partial, result)
    else:
        result.copy_(sum_partials(partial, partial.new_empty((rows, out))) + bias)


def bilinear_backward(
    grad: Tensor,
    x: Tensor,
    y: Tensor,
    weight: Tensor,
    grad_x: Tensor | None,
    grad_y: Tensor | None,
    grad_weight: Tensor | None,
    grad_bias: Tensor | None,
) -> None:
    """One kernel for the gradients of the inputs and one for that of the weight."""
    (rows, dx), dy, out = x.shape, y.shape[1], weight.shape[0]
    config, constants = _config(x, backward=True)
    column_blocks = cdiv(dy, config.block_n)
    if grad_x is not None or grad_y is not None:
        row_blocks = cdiv(rows, config.block_m)
        parts, steps = _parts(row_blocks * column_blocks, dx)
        partial_x = None if grad_x is None else x.new_empty((column_blocks, rows, dx), dtype=torch.float32)
        partial_y = None if grad_y is None else x.new_empty((parts, rows, dy), dtype=torch.float32)
        arguments = (
            grad,
            x,
            y,
            weight,
            partial_x,
            partial_y,
            grad.stride(0),
            x.stride(0),
            y.stride(0),
            weight.stride(0),
            weight.stride(1),
            rows,
            out,
            dx,
            dy,
            row_blocks,
            column_blocks,
            steps,
        )
        grid = row_blocks * column_blocks * parts
        # Operands of float32 are there twice.
        of_inputs = replace(config, num_stages=1) if x.dtype == torch.float32 and config is TILE else config
        launch("bilinear_inputs", bilinear_inputs_kernel, grid, arguments, constants, of_inputs)
        for partial, to in ((partial_x, grad_x), (partial_y, grad_y)):
            if partial is not None and to is not None:
                sum_partials(partial, to)
    if grad_weight is not None:
        out_blocks = cdiv(out, config.block_m)
        of_weight = (
            grad,
            x,
            y,
            grad_weight,
            grad.stride(0),
            x.stride(0),
            y.stride(0),
            rows,
            out,
            dx,
            dy,
            out_blocks,
            column_blocks,
        )
        grid = out_blocks * column_blocks * dx
        launch("bilinear_weight", bilinear_weight_kernel, grid, of_weight, constants, config)
    if grad_bias is not None:
        grad_bias.copy_(grad.sum(0, dtype=torch.float32))
