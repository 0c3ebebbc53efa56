"""bilinear by Triton kernels: the launches, for tensors in canonical form."""

from __future__ import annotations

import torch

from velm_kernels.backends.triton import Config, architecture, launch, precision
from velm_kernels.fusion.triton_bilinear_kernels import bilinear_inputs_kernel, bilinear_kernel, bilinear_weight_kernel
from velm_kernels.triton.launches import FEW_PROGRAMS, cdiv, sum_partials

GRAD_X, GRAD_Y, GRAD_WEIGHT, GRAD_BIAS = 1, 2, 4, 8
TILE = Config(64, 64, 8, 2)
# What the registers hold where float32 is multiplied by three products of mma.sync, and where they are fewest.
NARROW = Config(32, 32, 4, 2)
# Small tiles for the interpreter, so that small tests cross many of their edges.
SMALL = Config(16, 16, 4, 1)
# Steps of depth at a time, by element size.
STEP = {2: 64, 4: 32}
# Sums of one element are kept in this many parts at the most.
PARTS = 32


def _config(x: torch.Tensor, backward: bool = False) -> tuple[Config, dict[str, object]]:
    arch = architecture(x.device)
    interpreted = arch == 0
    config = SMALL if interpreted else TILE
    if (arch in (80, 120) and x.dtype == torch.float32) or (arch == 120 and backward):
        config = NARROW
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


def bilinear_forward(x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """`velm::bilinear_forward` by a Triton kernel; its parts are added by another."""
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
        return sum_partials(partial, x.new_empty((rows, out)))
    return (sum_partials(partial, partial.new_empty((rows, out))) + bias).to(x.dtype)


def bilinear_backward(
    grad: torch.Tensor, x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor, grad_mask: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """`velm::bilinear_backward`: one kernel for the gradients of the inputs and one for that of the weight."""
    (rows, dx), dy, out = x.shape, y.shape[1], weight.shape[0]
    config, constants = _config(x, backward=True)
    grads = [x.new_empty((0,)) for _ in range(4)]
    column_blocks = cdiv(dy, config.block_n)
    if grad_mask & (GRAD_X | GRAD_Y):
        row_blocks = cdiv(rows, config.block_m)
        parts, steps = _parts(row_blocks * column_blocks, dx)
        partial_x = x.new_empty((column_blocks, rows, dx), dtype=torch.float32) if grad_mask & GRAD_X else None
        partial_y = x.new_empty((parts, rows, dy), dtype=torch.float32) if grad_mask & GRAD_Y else None
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
        launch("bilinear_inputs", bilinear_inputs_kernel, grid, arguments, constants, config)
        if partial_x is not None:
            grads[0] = sum_partials(partial_x, x.new_empty((rows, dx)))
        if partial_y is not None:
            grads[1] = sum_partials(partial_y, y.new_empty((rows, dy)))
    if grad_mask & GRAD_WEIGHT:
        grads[2] = weight.new_empty((out, dx, dy))
        out_blocks = cdiv(out, config.block_m)
        of_weight = (
            grad,
            x,
            y,
            grads[2],
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
    if grad_mask & GRAD_BIAS:
        grads[3] = grad.sum(0, dtype=torch.float32).to(grad.dtype)
    return grads[0], grads[1], grads[2], grads[3]
