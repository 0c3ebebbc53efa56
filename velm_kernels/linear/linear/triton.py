"""linear by Triton kernels: the launches, for tensors in canonical form.

The products are torch's, which are near the limit of a GPU. Triton does what would be several passes of torch in one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from velm_kernels.backends.triton import Config, launch
from velm_kernels.linear.linear.torch_products import product, product_backward
from velm_kernels.linear.linear.triton_kernels import linear_epilogue_kernel, linear_grad_kernel
from velm_kernels.triton.launches import FEW_PROGRAMS, cdiv, sum_partials

TILE = Config(16, 128, 4, 1)


def linear_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
    keeps: str,
    out: Tensor,
    kept: Tensor | None,
) -> None:
    """torch's product with its bias, then one pass for the rest."""
    z = kept if kept is not None and keeps == "z" else out
    product(x, weight, bias, z)
    if not activation and residual is None:
        return
    rows, features = z.shape
    row_blocks, column_blocks = cdiv(rows, TILE.block_m), cdiv(features, TILE.block_n)
    arguments = (
        z,
        residual,
        out,
        kept if keeps == "value" else None,
        residual.stride(0) if residual is not None else None,
        rows,
        features,
        column_blocks,
    )
    constants = {"ACTIVATION": activation, "BLOCK_M": TILE.block_m, "BLOCK_N": TILE.block_n}
    launch("linear_epilogue", linear_epilogue_kernel, row_blocks * column_blocks, arguments, constants, TILE)


def linear_backward(
    grad: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    out: Tensor | None,
    kept: Tensor | None,
    activation: str,
    keeps: str,
    grad_x: Tensor | None,
    grad_weight: Tensor | None,
    grad_bias: Tensor | None,
) -> None:
    """One pass for the activation's gradient and the sum for bias, then torch's products."""
    saved = out if kept is None else kept
    rows, features = grad.shape
    grad_z = grad
    if saved is not None or grad_bias is not None:
        needs_z = saved is not None and (grad_x is not None or grad_weight is not None)
        grad_z = grad.new_empty((rows, features)) if needs_z else grad
        row_blocks, column_blocks = cdiv(rows, TILE.block_m), cdiv(features, TILE.block_n)
        steps = max(1, row_blocks * column_blocks // (4 * FEW_PROGRAMS))
        programs = cdiv(row_blocks, steps)
        partials = None if grad_bias is None else grad.new_empty((programs, features), dtype=torch.float32)
        arguments = (
            grad,
            saved,
            grad_z if needs_z else None,
            partials,
            grad.stride(0),
            rows,
            features,
            column_blocks,
            steps,
        )
        constants = {
            "ACTIVATION": activation,
            "FROM_VALUE": keeps != "z",
            "BLOCK_M": TILE.block_m,
            "BLOCK_N": TILE.block_n,
        }
        launch("linear_grad", linear_grad_kernel, programs * column_blocks, arguments, constants, TILE)
        if partials is not None and grad_bias is not None:
            sum_partials(partials, grad_bias)
    product_backward(grad_z, x, weight, grad_x, grad_weight)
