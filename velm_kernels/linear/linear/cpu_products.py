"""linear on the CPU: the library's own product with its epilogue, or torch's product and a fused epilogue."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from velm_kernels.backends import cpu
from velm_kernels.layout import empty_like
from velm_kernels.linear.linear.torch_products import product, product_backward
from velm_kernels.products import own_product_of

# out = activation(z + bias) + residual. saved, if given, receives what backward needs: z + bias, or where
# reference.from_value says so the activation's value. One of out and saved may be z itself. All are
# (rows, out_features) and contiguous.
cpu.declare(
    "linear_epilogue(Tensor z, Tensor? bias, Tensor? residual, str activation, Tensor(a!) out, Tensor(b!)? saved) -> ()"
)
# grad_z = grad * activation'(z), contiguous, and grad_bias, its sum over rows.
cpu.declare(
    "linear_epilogue_backward(Tensor grad, Tensor? saved, str activation, Tensor(a!)? grad_z, Tensor(b!)? grad_bias) "
    "-> ()"
)

Kernel = Callable[[str], Callable[..., Any]]


def _readable(matrix: Tensor) -> Tensor:
    """``matrix`` as torch may read it: by AMX it takes bfloat16 in pairs, and where a row has an odd number of them
    what lies behind the row in memory too, whose NaN would come out."""
    odd = matrix.dtype == torch.bfloat16 and matrix.shape[1] % 2 == 1
    return matrix.contiguous() if odd else matrix


def linear_forward(
    kernel: Kernel,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
    keeps: str,
    out: Tensor,
    kept: Tensor | None,
) -> None:
    if min(weight.shape) and own_product_of(x.shape[0], x.dtype):
        kernel("linear_forward")(x, weight, bias, residual, activation, keeps, out, kept)
        return
    x, weight = _readable(x), _readable(weight)
    z = out if kept is None else kept
    # In float32 the bias goes with the epilogue, which reads and writes the result in any case. In 16 bits the product
    # is rounded before the epilogue sees it, and should be with its bias.
    follows = bool(activation) or residual is not None
    late = bias if follows and x.dtype == torch.float32 else None
    product(x, weight, None if late is not None else bias, z)
    if follows:
        kernel("linear_epilogue")(z, late, residual, activation, out, kept)


def linear_backward(
    kernel: Kernel,
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
    in_features = next((t.shape[1] for t in (x, weight) if t is not None), 0)
    if in_features and grad.shape[1] and own_product_of(grad.shape[0], grad.dtype):
        kernel("linear_backward")(grad, x, weight, out, kept, activation, keeps, grad_x, grad_weight, grad_bias)
        return
    saved = out if kept is None else kept
    grad_z = grad
    if saved is not None and (grad_x is not None or grad_weight is not None):
        grad_z = empty_like(grad)
    if grad_z is not grad or grad_bias is not None:
        of_z = None if grad_z is grad else grad_z
        kernel("linear_epilogue_backward")(grad, saved, activation, of_z, grad_bias)
    product_backward(grad_z, x, weight, grad_x, grad_weight)
