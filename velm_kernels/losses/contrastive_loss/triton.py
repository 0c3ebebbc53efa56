"""contrastive_loss by Triton kernels around torch's products: the launches."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from velm_kernels.backends.triton import Config, architecture, launch
from velm_kernels.losses.contrastive_loss import tiles
from velm_kernels.losses.contrastive_loss.triton_kernels import gradients_kernel, statistics_kernel
from velm_kernels.triton.launches import cdiv

Optional = Tensor | None

# Lines by steps: neighbours in memory are steps of a row, and lines that are columns.
ROWS, COLUMNS = Config(8, 256, 4, 1), Config(128, 16, 8, 1)
TILE = Config(16, 128, 4, 1)
# Small ones for the interpreter, so that small tests cross many of their edges.
SMALL = Config(16, 16, 4, 1)


def _constants(config: Config) -> dict[str, int]:
    return {"BLOCK_M": config.block_m, "BLOCK_N": config.block_n}


def contrastive_statistics(
    tile: Tensor,
    scale: Tensor,
    bias: Optional,
    diagonal: int,
    row_labels: Optional,
    column_labels: Optional,
    row_targets: Optional,
    column_targets: Optional,
    row_sums: Tensor,
    column_sums: Tensor,
) -> None:
    is_small = architecture(tile.device) == 0
    of_rows = (row_labels, column_labels, row_targets, row_sums, tile, row_targets, diagonal)
    turned = None if column_targets is None else column_targets.t()
    of_columns = (column_labels, row_labels, column_targets, column_sums, tile.t(), turned, -diagonal)
    for kind, config, given in (("contrastive_rows", ROWS, of_rows), ("contrastive_columns", COLUMNS, of_columns)):
        labels, others, targets, sums, lines, target_lines, apart = given
        strides = (*lines.stride(), *((0, 0) if target_lines is None else target_lines.stride()), sums.stride(0))
        arguments = (tile, scale, bias, labels, others, targets, sums, *strides, *lines.shape, apart)
        config = SMALL if is_small else config
        grid = cdiv(lines.shape[0], config.block_m)
        launch(kind, statistics_kernel, grid, arguments, _constants(config), config)


def contrastive_gradients(
    tile: Tensor,
    scale: Tensor,
    bias: Optional,
    diagonal: int,
    row_labels: Optional,
    column_labels: Optional,
    row_targets: Optional,
    column_targets: Optional,
    row_factors: Tensor,
    column_factors: Tensor,
) -> None:
    config = SMALL if architecture(tile.device) == 0 else TILE
    rows, columns = tile.shape
    column_blocks = cdiv(columns, config.block_n)
    of_targets = (row_labels, column_labels, row_targets, column_targets)
    factors = (row_factors, column_factors, row_factors.stride(0), column_factors.stride(0))
    arguments = (tile, scale, bias, *of_targets, *factors, rows, columns, diagonal, column_blocks)
    grid = cdiv(rows, config.block_m) * column_blocks
    launch("contrastive_gradients", gradients_kernel, grid, arguments, _constants(config), config)


def contrastive_loss_forward(*arguments: Any) -> None:
    tiles.forward(contrastive_statistics, *arguments)


def contrastive_loss_backward(*arguments: Any) -> None:
    tiles.backward(contrastive_gradients, *arguments)
