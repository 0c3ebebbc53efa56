"""gated_residual by Triton kernels: the launches."""

from __future__ import annotations

import torch

from velm_kernels.attention.gated_residual.triton_kernels import gated_residual_backward_kernel, gated_residual_kernel
from velm_kernels.backends.triton import Config, launch
from velm_kernels.triton.launches import FEW_PROGRAMS, cdiv, sum_partials

TILE = Config(8, 256, 4, 1)


def _as_bytes(mask: torch.Tensor | None) -> torch.Tensor | None:
    return None if mask is None else mask.view(torch.uint8)


def gated_residual_forward(
    residual: torch.Tensor, x: torch.Tensor, gate: torch.Tensor, row_mask: torch.Tensor | None, out: torch.Tensor
) -> None:
    rows, dim = x.shape
    dim_blocks = cdiv(dim, TILE.block_n)
    arguments = (
        residual,
        x,
        gate,
        _as_bytes(row_mask),
        out,
        residual.stride(0),
        x.stride(0),
        rows,
        dim,
        dim_blocks,
    )
    constants = {"GATE_IS_ROW": gate.numel() == dim, "BLOCK_M": TILE.block_m, "BLOCK_N": TILE.block_n}
    launch("gated_residual", gated_residual_kernel, cdiv(rows, TILE.block_m) * dim_blocks, arguments, constants, TILE)


def gated_residual_backward(
    grad: torch.Tensor,
    x: torch.Tensor | None,
    gate: torch.Tensor,
    row_mask: torch.Tensor | None,
    x_dtype: torch.dtype,
    grad_x: torch.Tensor | None,
    grad_gate: torch.Tensor | None,
) -> None:
    rows, dim = grad.shape
    row_blocks, dim_blocks = cdiv(rows, TILE.block_m), cdiv(dim, TILE.block_n)
    steps = max(1, row_blocks * dim_blocks // (4 * FEW_PROGRAMS))
    row_programs = cdiv(row_blocks, steps)
    is_row = gate.numel() == dim
    partials = None
    if grad_gate is not None:
        shape = (row_programs, dim) if is_row else (row_programs * dim_blocks, 1)
        partials = grad.new_empty(shape, dtype=torch.float32)
    arguments = (
        grad,
        x if grad_gate is not None else None,
        gate,
        _as_bytes(row_mask),
        grad_x,
        partials,
        0 if x is None else x.stride(0),
        rows,
        dim,
        dim_blocks,
        steps,
    )
    constants = {"GATE_IS_ROW": is_row, "BLOCK_M": TILE.block_m, "BLOCK_N": TILE.block_n}
    grid = row_programs * dim_blocks
    launch("gated_residual_backward", gated_residual_backward_kernel, grid, arguments, constants, TILE)
    if partials is not None and grad_gate is not None:
        sum_partials(partials, grad_gate)
