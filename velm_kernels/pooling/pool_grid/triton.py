"""pool_grid by Triton kernels: the launches."""

from __future__ import annotations

from torch import Tensor

from velm_kernels.backends.triton import launch
from velm_kernels.pooling.pool_grid.triton_kernels import pool_grid_backward_kernel, pool_grid_kernel
from velm_kernels.pooling.triton_windows import CONSTANTS, TILE, leaves_out, sizes_of


def pool_grid_forward(x: Tensor, windows: Tensor | None, height: int, width: int, factor: int, out: Tensor) -> None:
    batch, rows, dim = out.shape
    grid, blocks = sizes_of(batch, rows, dim)
    arguments = (x, out, windows, x.stride(0), x.stride(1), x.shape[1], rows, width, factor, dim, *blocks)
    launch("pool_grid", pool_grid_kernel, grid, arguments, CONSTANTS, TILE)


def pool_grid_backward(
    grad: Tensor, windows: Tensor | None, tokens: int, height: int, width: int, factor: int, grad_x: Tensor
) -> None:
    batch, rows, dim = grad.shape
    if leaves_out(windows, height, width, factor):
        grad_x.zero_()
    grid, blocks = sizes_of(batch, rows, dim)
    arguments = (grad, grad_x, windows, grad.stride(0), grad.stride(1), tokens, rows, width, factor, dim, *blocks)
    launch("pool_grid_backward", pool_grid_backward_kernel, grid, arguments, CONSTANTS, TILE)
