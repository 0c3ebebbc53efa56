"""The CPU implementation: the library's own product with its epilogue, or torch's product and a fused epilogue."""

from __future__ import annotations

import torch
from torch import Tensor

from velm_kernels.backends import cpu
from velm_kernels.products import own_product

GRAD_BIAS = 4

reasons = cpu.common_reasons

# out = activation(z + bias) + residual. saved, if given, receives what backward needs: z + bias, or where
# reference.from_value says so the activation's value. One of out and saved may be z itself. All are
# (rows, out_features) and contiguous.
cpu.declare(
    "linear_epilogue(Tensor z, Tensor? bias, Tensor? residual, str activation, Tensor(a!) out, Tensor(b!)? saved) -> ()"
)
# (grad_z, grad_bias): grad * activation'(z), contiguous, and its sum over rows; shape (0,) for what is not wanted.
cpu.declare(
    "linear_activation_gradient(Tensor grad, Tensor? saved, str activation, bool wants_grad_z, bool wants_grad_bias) "
    "-> (Tensor, Tensor)"
)


def _readable(matrix: Tensor) -> Tensor:
    """``matrix`` as torch may read it: by AMX it takes bfloat16 in pairs, and where a row has an odd number of them
    what lies behind the row in memory too, whose NaN would come out."""
    odd = matrix.dtype == torch.bfloat16 and matrix.shape[1] % 2 == 1
    return matrix.contiguous() if odd else matrix


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, activation: str, save: bool
) -> tuple[Tensor, Tensor]:
    if own_product(x.shape[0], x.shape[1], weight.shape[0], x.dtype, x.device, save):
        return cpu.op("linear_forward")(x, weight, bias, residual, activation, save)
    kept = x.new_empty((0,))
    x, weight = _readable(x), _readable(weight)
    if not activation and residual is None:
        return torch.nn.functional.linear(x, weight, bias), kept
    if x.dtype == torch.float32:
        # The bias goes with the epilogue, which reads and writes the result in any case.
        z = torch.mm(x, weight.t())
    else:
        # Here the product is rounded before the epilogue sees it, and should be with its bias.
        z, bias = torch.nn.functional.linear(x, weight, bias), None
    out = z
    if save:
        out, kept = torch.empty_like(z), z
    cpu.op("linear_epilogue")(z, bias, residual, activation, out, kept if save else None)
    return out, kept


def backward(
    grad: Tensor, x: Tensor | None, weight: Tensor | None, saved: Tensor | None, activation: str, grad_mask: int
) -> tuple[Tensor, Tensor, Tensor]:
    in_features = next((t.shape[1] for t in (x, weight) if t is not None), 0)
    if own_product(grad.shape[0], in_features, grad.shape[1], grad.dtype, grad.device, True):
        return cpu.op("linear_backward")(grad, x, weight, saved, activation, grad_mask)
    grad_z, grad_bias = cpu.op("linear_activation_gradient")(
        grad, saved, activation, saved is not None and bool(grad_mask & ~GRAD_BIAS), bool(grad_mask & GRAD_BIAS)
    )
    if saved is None:
        grad_z = grad
    grad_x, grad_weight = grad.new_empty((0,)), grad.new_empty((0,))
    if weight is not None:
        grad_x = torch.mm(grad_z, weight)
    if x is not None:
        grad_weight = torch.mm(grad_z.t(), x)
    return grad_x, grad_weight, grad_bias
