"""linear by Triton kernels: the launches, for tensors in canonical form.

The product runs in Triton where there is an epilogue to fuse into it. A product alone, and those of backward, are
torch's: they are near the limit there.
"""

from __future__ import annotations

import torch

from velm_kernels.attention.triton_attention import FEW_PROGRAMS, sum_partials
from velm_kernels.attention.triton_problem import NARROW_STRIDE, cdiv
from velm_kernels.backends.triton import Config, choose, launch, precision
from velm_kernels.linear.reference import from_value
from velm_kernels.linear.triton_kernels import linear_grad_kernel, linear_kernel

GRAD_X, GRAD_WEIGHT, GRAD_BIAS = 1, 2, 4
# Columns of x and weight a step, by element size.
STEP = {2: 64, 4: 32}
TILE = Config(16, 128, 4, 1)


def _near_rows(x: torch.Tensor) -> torch.Tensor:
    """`x` in rows near enough for 32-bit offsets inside of a tile."""
    return x if x.stride(0) < NARROW_STRIDE else x.contiguous()


def linear_forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    activation: str,
    save: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`velm::linear_forward`: torch's product, or the Triton one where an epilogue can be fused."""
    if not activation and residual is None:
        return torch.nn.functional.linear(x, weight, bias), x.new_empty((0,))
    x, weight = _near_rows(x), _near_rows(weight)
    residual = None if residual is None else _near_rows(residual)
    rows, out_features = x.shape[0], weight.shape[0]
    out = x.new_empty((rows, out_features))
    saved = x.new_empty((rows, out_features) if save else (0,))

    def run(config: Config) -> None:
        row_blocks, column_blocks = cdiv(rows, config.block_m), cdiv(out_features, config.block_n)
        arguments = (
            x,
            weight,
            bias,
            residual,
            out,
            saved if save else None,
            x.stride(0),
            weight.stride(0),
            residual.stride(0) if residual is not None else None,
            rows,
            out_features,
            x.shape[1],
            row_blocks,
            column_blocks,
        )
        constants = {
            "ACTIVATION": activation,
            "SAVES_VALUE": from_value(activation, x.dtype),
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
            "BLOCK_K": STEP[x.dtype.itemsize],
            "GROUP": 8,
            "PRECISION": precision(x.dtype),
        }
        launch("linear", linear_kernel, row_blocks * column_blocks, arguments, constants, config)

    variant = f"{activation},{residual is not None},{save}"
    run(choose("linear", "plain", x.dtype, 64, x.device, (rows, out_features, x.shape[1]), variant, run))
    return out, saved


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
