"""merge_patches by a Triton kernel: the launches."""

from __future__ import annotations

from torch import Tensor

from velm_kernels.backends.triton import launch
from velm_kernels.pooling.merge_patches.triton_kernels import merge_patches_kernel
from velm_kernels.pooling.triton_windows import CONSTANTS, TILE, leaves_out, sizes_of


def merge_patches_forward(
    x: Tensor, windows: Tensor | None, height: int, width: int, factor: int, channels: bool, out: Tensor
) -> None:
    _move("merge_patches", x, out, windows, width, factor, channels, False)


def merge_patches_backward(
    grad: Tensor,
    windows: Tensor | None,
    tokens: int,
    dim: int,
    height: int,
    width: int,
    factor: int,
    channels: bool,
    grad_x: Tensor,
) -> None:
    if leaves_out(windows, height, width, factor):
        grad_x.zero_()
    _move("merge_patches_backward", grad_x, grad, windows, width, factor, channels, True)


def _move(
    name: str,
    x: Tensor,
    merged: Tensor,
    windows: Tensor | None,
    width: int,
    factor: int,
    channels: bool,
    back: bool,
) -> None:
    batch, tokens, dim = x.shape
    rows = merged.shape[1]
    grid, blocks = sizes_of(batch, rows, dim)
    strides = (x.stride(0), x.stride(1), merged.stride(0), merged.stride(1))
    arguments = (x, merged, windows, *strides, tokens, rows, width, factor, dim, *blocks)
    launch(name, merge_patches_kernel, grid, arguments, {"CHANNELS": channels, "BACK": back, **CONSTANTS}, TILE)
