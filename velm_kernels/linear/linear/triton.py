"""linear by Triton kernels: the launches, for tensors in canonical form.

The products are torch's, which are near the limit of a GPU. Triton does what would be several passes of torch in one.
"""

from __future__ import annotations

import torch

from velm_kernels.backends.triton import Config, launch
from velm_kernels.linear.linear.reference import from_value
from velm_kernels.linear.linear.triton_kernels import linear_epilogue_kernel, linear_grad_kernel
from velm_kernels.triton.launches import FEW_PROGRAMS, cdiv, sum_partials

GRAD_X, GRAD_WEIGHT, GRAD_BIAS = 1, 2, 4
TILE = Config(16, 128, 4, 1)


def linear_forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    activation: str,
    save: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`velm::linear_forward`: torch's product with its bias, then one pass for the rest."""
    z = torch.nn.functional.linear(x, weight, bias)
    if not activation and residual is None:
        return z, x.new_empty((0,))
    rows, features = z.shape
    of_value = from_value(activation, x.dtype)
    kept = x.new_empty((0,))
    if save:
        kept = torch.empty_like(z) if of_value else z
    out = torch.empty_like(z) if kept is z else z
    row_blocks, column_blocks = cdiv(rows, TILE.block_m), cdiv(features, TILE.block_n)
    arguments = (
        z,
        residual,
        out,
        kept if save and of_value else None,
        residual.stride(0) if residual is not None else None,
        rows,
        features,
        column_blocks,
    )
    constants = {"ACTIVATION": activation, "BLOCK_M": TILE.block_m, "BLOCK_N": TILE.block_n}
    launch("linear_epilogue", linear_epilogue_kernel, row_blocks * column_blocks, arguments, constants, TILE)
    return out, kept


def linear_backward(
    grad: torch.Tensor,
    x: torch.Tensor | None,
    weight: torch.Tensor | None,
    saved: torch.Tensor | None,
    activation: str,
    grad_mask: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`velm::linear_backward`: one pass for the activation's gradient and the sum for bias, then torch's products."""
    rows, features = grad.shape
    wants_bias = bool(grad_mask & GRAD_BIAS)
    grad_z = grad
    # Results of an operator must not be one another, not even empty ones.
    grad_bias = grad.new_empty((0,))
    if saved is not None or wants_bias:
        needs_z = saved is not None and (x is not None or weight is not None)
        grad_z = grad.new_empty((rows, features)) if needs_z else grad
        row_blocks, column_blocks = cdiv(rows, TILE.block_m), cdiv(features, TILE.block_n)
        steps = max(1, row_blocks * column_blocks // (4 * FEW_PROGRAMS))
        programs = cdiv(row_blocks, steps)
        partials = grad.new_empty((programs, features), dtype=torch.float32) if wants_bias else None
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
            "FROM_VALUE": from_value(activation, grad.dtype),
            "BLOCK_M": TILE.block_m,
            "BLOCK_N": TILE.block_n,
        }
        launch("linear_grad", linear_grad_kernel, programs * column_blocks, arguments, constants, TILE)
        if partials is not None:
            grad_bias = sum_partials(partials, grad.new_empty((features,)))
    return (
        grad.new_empty((0,)) if weight is None else grad_z @ weight,
        grad.new_empty((0,)) if x is None else grad_z.transpose(0, 1) @ x,
        grad_bias,
    )
