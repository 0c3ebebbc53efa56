"""linear by torch alone: on GPUs its products are cuBLASLt's, with bias, ReLU and GELU in their epilogue.

The operator's other epilogues are one pass behind the product where torch has one operator for them. Where it would
take several, Triton's pass behind the same product comes first (:func:`is_best`, :func:`is_best_backward`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from velm_kernels.backends import Arguments, order, register, tensors_of
from velm_kernels.backends.cpu import DTYPES
from velm_kernels.linear.linear import reference

GRAD_BIAS = 4
_aten = torch.ops.aten


def reasons(arguments: Arguments) -> list[str]:
    return [
        f"{name} is {tensor.dtype}, not float32, bfloat16 or float16"
        for name, tensor in tensors_of(arguments)
        if tensor.dtype not in DTYPES
    ]


def is_best(arguments: Arguments) -> bool:
    """Whether the product and one pass behind it are all that torch needs forward."""
    activation = arguments["activation"]
    return activation != "quick_gelu" and not (activation and arguments["residual"] is not None)


def is_best_backward(arguments: Arguments) -> bool:
    """Whether one pass before the products is all that torch needs backward: not the activation's and a sum of it."""
    activation = arguments["activation"]
    return activation != "quick_gelu" and not (activation and arguments["grad_mask"] & GRAD_BIAS)


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, activation: str, save: bool
) -> tuple[Tensor, Tensor]:
    kept = x.new_empty((0,))
    if not activation:
        if residual is not None and bias is None:
            return torch.addmm(residual, x, weight.t()), kept
        out = torch.nn.functional.linear(x, weight, bias)
        return out if residual is None else out.add_(residual), kept
    if bias is not None and residual is None and not save and _has_epilogue(activation, x.device):
        return torch._addmm_activation(bias, x, weight.t(), use_gelu=activation == "gelu_tanh"), kept
    z = torch.nn.functional.linear(x, weight, bias)
    value = reference.activate(z, activation)
    if save:
        kept = value if reference.from_value(activation, x.dtype) else z
    if residual is None:
        return value, kept
    return value.add_(residual) if kept is not value else value + residual, kept


def _has_epilogue(activation: str, device: torch.device) -> bool:
    # On the CPU torch's operator means the other GELU, by erf.
    return activation == "relu" or (activation == "gelu_tanh" and device.type == "cuda")


def activation_backward(grad: Tensor, saved: Tensor, activation: str) -> Tensor:
    """``grad * activation'(z)`` by the operators of torch's own autograd."""
    if activation == "relu":
        return _aten.threshold_backward(grad, saved, 0)
    if activation in ("gelu", "gelu_tanh"):
        return _aten.gelu_backward(grad, saved, approximate="tanh" if activation == "gelu_tanh" else "none")
    if activation == "silu":
        return _aten.silu_backward(grad, saved)
    of_value = reference.from_value(activation, grad.dtype)
    if activation == "tanh" and of_value:
        return _aten.tanh_backward(grad, saved)
    # In steps, of which none should round to 16 bits.
    return reference.activation_gradient(grad.float(), saved.float(), activation, of_value).to(grad.dtype)


def backward(
    grad: Tensor, x: Tensor | None, weight: Tensor | None, saved: Tensor | None, activation: str, grad_mask: int
) -> tuple[Tensor, Tensor, Tensor]:
    grad_z = grad if saved is None else activation_backward(grad, saved, activation)
    return (
        grad.new_empty((0,)) if weight is None else grad_z @ weight,
        grad.new_empty((0,)) if x is None else grad_z.t() @ x,
        grad_z.sum(0) if grad_mask & GRAD_BIAS else grad.new_empty((0,)),
    )


register("linear_forward", "torch", forward, reasons)
register("linear_backward", "torch", backward, reasons)
order.prefer_torch("linear_forward", where_the_table_lets_it=is_best)
order.prefer_torch("linear_backward", where_the_table_lets_it=is_best_backward)
