"""sigmoid_loss by a Triton kernel around torch's products: the launches."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from velm_kernels.backends.triton import Config, architecture, launch
from velm_kernels.losses.sigmoid_loss import tiles
from velm_kernels.losses.sigmoid_loss.triton_kernels import sigmoid_pass_kernel
from velm_kernels.triton.launches import cdiv

Optional = Tensor | None

TILE = Config(8, 256, 4, 1)
# Small ones for the interpreter, so that small tests cross many of their edges.
SMALL = Config(16, 16, 4, 1)


def sigmoid_pass(
    tile: Tensor,
    scale: Tensor,
    bias: Optional,
    diagonal: int,
    row_labels: Optional,
    column_labels: Optional,
    weights: Optional,
    gradients: bool,
    sums: Tensor,
) -> None:
    config = SMALL if architecture(tile.device) == 0 else TILE
    given = (tile, scale, bias, row_labels, column_labels, weights, sums, sums.stride(0), *tile.shape, diagonal)
    constants = {"GRADIENTS": gradients, "BLOCK_M": config.block_m, "BLOCK_N": config.block_n}
    launch("sigmoid_pass", sigmoid_pass_kernel, cdiv(tile.shape[0], config.block_m), given, constants, config)


def sigmoid_loss_forward(*arguments: Any) -> None:
    tiles.forward(sigmoid_pass, *arguments)


def sigmoid_loss_backward(*arguments: Any) -> None:
    tiles.backward(sigmoid_pass, *arguments)
