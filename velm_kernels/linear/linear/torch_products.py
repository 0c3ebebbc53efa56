"""linear by torch alone: on GPUs its products are cuBLASLt's, with bias, ReLU and GELU in their epilogue.

The operator's other epilogues are one pass behind the product where torch has one operator for them. Where it would
take several, Triton's pass behind the same product comes first (:func:`is_best`, :func:`is_best_backward`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from velm_kernels.backends import Arguments
from velm_kernels.linear.linear import reference

# Bit of ``wanted``.
BIAS = 4
_aten = torch.ops.aten


def is_best(arguments: Arguments) -> bool:
    """Whether the product and one pass behind it are all that torch needs forward."""
    activation = arguments["activation"]
    return activation != "quick_gelu" and not (activation and arguments["residual"] is not None)


def is_best_backward(arguments: Arguments) -> bool:
    """Whether one pass before the products is all that torch needs backward: not the activation's and a sum of it."""
    activation = arguments["activation"]
    return activation != "quick_gelu" and not (activation and arguments["wanted"] & BIAS)


def product(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """``out = x weight^T + bias`` by torch."""
    if bias is None:
        torch.mm(x, weight.t(), out=out)
    else:
        torch.addmm(bias, x, weight.t(), out=out)


def product_backward(
    grad: Tensor, x: Tensor | None, weight: Tensor | None, grad_x: Tensor | None, grad_weight: Tensor | None
) -> None:
    """Those gradients of the product that are wanted, from that of its result."""
    if grad_x is not None and weight is not None:
        torch.mm(grad, weight, out=grad_x)
    if grad_weight is not None and x is not None:
        torch.mm(grad.t(), x, out=grad_weight)


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
    if not activation:
        if residual is not None and bias is None:
            torch.addmm(residual, x, weight.t(), out=out)
            return
        product(x, weight, bias, out)
    elif bias is not None and residual is None and kept is None and _has_epilogue(activation, x.device):
        torch._addmm_activation(bias, x, weight.t(), use_gelu=activation == "gelu_tanh", out=out)
    else:
        z = out if kept is None else kept
        product(x, weight, bias, z)
        value = kept if kept is not None and keeps == "value" else out
        _activate(z, activation, value)
        if residual is not None:
            torch.add(value, residual, out=out)
        return
    if residual is not None:
        out.add_(residual)


def _has_epilogue(activation: str, device: torch.device) -> bool:
    # On the CPU torch's operator means the other GELU, by erf.
    return activation == "relu" or (activation == "gelu_tanh" and device.type == "cuda")


def _activate(z: Tensor, activation: str, out: Tensor) -> None:
    """``out = activation(z)``; out may be z."""
    if activation == "relu":
        _aten.relu.out(z, out=out)
    elif activation in ("gelu", "gelu_tanh"):
        _aten.gelu.out(z, approximate="tanh" if activation == "gelu_tanh" else "none", out=out)
    elif activation == "silu":
        _aten.silu.out(z, out=out)
    elif activation == "tanh":
        torch.tanh(z, out=out)
    else:
        out.copy_(reference.activate(z, activation))


def _activation_backward(grad: Tensor, saved: Tensor, activation: str) -> Tensor:
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
    saved = out if kept is None else kept
    grad_z = grad if saved is None else _activation_backward(grad, saved, activation)
    product_backward(grad_z, x, weight, grad_x, grad_weight)
    if grad_bias is not None:
        torch.sum(grad_z, 0, out=grad_bias)
