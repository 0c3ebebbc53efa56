"""dropout_residual by a Triton kernel: the launches."""

from __future__ import annotations

import torch

from velm_kernels.backends.triton import Config, launch
from velm_kernels.fusion.dropout_residual.reference import BLOCK
from velm_kernels.fusion.dropout_residual.triton_kernels import dropout_residual_kernel

TILE = Config(8, 256, 4, 1)


def dropout_residual_forward(
    x: torch.Tensor, residual: torch.Tensor | None, seed: torch.Tensor, dropout_p: float, out: torch.Tensor
) -> None:
    rows, dim = x.shape
    row_blocks, dim_blocks = -(-rows // TILE.block_m), -(-dim // TILE.block_n)
    arguments = (
        x,
        residual,
        out,
        seed,
        int(dropout_p * 2**32),
        1.0 / (1.0 - dropout_p),
        x.stride(0),
        None if residual is None else residual.stride(0),
        rows,
        dim,
        dim_blocks,
    )
    constants = {"BLOCK_M": TILE.block_m, "BLOCK_G": TILE.block_n // BLOCK}
    launch("dropout_residual", dropout_residual_kernel, row_blocks * dim_blocks, arguments, constants, TILE)


def dropout_residual_backward(grad: torch.Tensor, seed: torch.Tensor, dropout_p: float, grad_x: torch.Tensor) -> None:
    """The same elements of the gradient are dropped and scaled."""
    dropout_residual_forward(grad, None, seed, dropout_p, grad_x)
