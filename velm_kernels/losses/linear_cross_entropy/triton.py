"""linear_cross_entropy by Triton kernels around torch's products: the launches, for tensors in canonical form."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from velm_kernels.backends.triton import Config, architecture, launch
from velm_kernels.losses.linear_cross_entropy import chunks
from velm_kernels.losses.linear_cross_entropy.triton_kernels import (
    linear_cross_entropy_gradient_kernel,
    linear_cross_entropy_sums_kernel,
)
from velm_kernels.triton.launches import cdiv

# Of a row.
TILE, SMALL = Config(1, 1024, 4, 1), Config(1, 16, 4, 1)
# 256 MiB. Counting the rows with a label would wait for the GPU.
SIZES = chunks.Sizes(1 << 28, 256, 0, gathers=False)
# Small chunks for the interpreter, so that small tests cross their edges.
FEW = chunks.Sizes(1, 7, 40, gathers=False)


class _Passes:
    def __init__(self, like: Tensor) -> None:
        self.tile = SMALL if architecture(like.device) == 0 else TILE

    def fresh(self, x: Tensor) -> None:
        pass

    def sums(
        self,
        z: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        first: int,
        softcap: float,
        smooths: bool,
        details: bool,
        sums: Tensor,
    ) -> None:
        arguments = (z, bias, targets, sums, z.stride(0), *z.shape, first, softcap)
        constants = {"CAPPED": softcap > 0, "SMOOTHS": smooths, "DETAILS": details, "BLOCK": self.tile.block_n}
        kernel = linear_cross_entropy_sums_kernel
        launch("linear_cross_entropy_sums", kernel, z.shape[0], arguments, constants, self.tile)

    def gradient(
        self,
        z: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        first: int,
        softcap: float,
        details: bool,
        weights: Tensor,
    ) -> None:
        column_blocks = cdiv(z.shape[1], self.tile.block_n)
        arguments = (z, bias, targets, weights, z.stride(0), *z.shape, first, column_blocks, softcap)
        constants = {"CAPPED": softcap > 0, "DETAILS": details, "BLOCK": self.tile.block_n}
        kernel, grid = linear_cross_entropy_gradient_kernel, z.shape[0] * column_blocks
        launch("linear_cross_entropy_gradient", kernel, grid, arguments, constants, self.tile)


def _sizes(like: Tensor) -> chunks.Sizes:
    return FEW if architecture(like.device) == 0 else SIZES


def linear_cross_entropy_forward(hidden: Tensor, *arguments: Any) -> None:
    chunks.forward(_Passes(hidden), _sizes(hidden), hidden, *arguments)


def linear_cross_entropy_backward(
    grad_loss: Tensor | None,
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
    hidden: Tensor,
    *arguments: Any,
) -> None:
    chunks.backward(_Passes(hidden), _sizes(hidden), grad_loss, grad_logprobs, grad_entropy, hidden, *arguments)
