"""The written meaning of :func:`velm_kernels.linear`, in plain torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# "" is no activation. GELU and its tanh form: Hendrycks and Gimpel, 2016; quick_gelu is its sigmoid form with the
# constant of CLIP; silu: Elfwing et al., 2017.
ACTIVATIONS = ("", "relu", "gelu", "gelu_tanh", "quick_gelu", "silu", "tanh")


def from_value(activation: str, dtype: torch.dtype) -> bool:
    """Whether backward takes the derivative from the activation's value, and so needs no pre-activation.

    Of tanh not in 16 bits: beside a value rounded to 1 nothing is left of 1 - tanh^2.
    """
    return activation == "relu" or (activation == "tanh" and dtype.itemsize > 2)


def activate(z: Tensor, activation: str) -> Tensor:
    if activation == "":
        return z
    if activation == "relu":
        return F.relu(z)
    if activation == "gelu":
        return F.gelu(z)
    if activation == "gelu_tanh":
        return F.gelu(z, approximate="tanh")
    if activation == "quick_gelu":
        return z * torch.sigmoid(1.702 * z)
    if activation == "silu":
        return F.silu(z)
    if activation == "tanh":
        return torch.tanh(z)
    raise ValueError(f"activation: expected one of {', '.join(ACTIVATIONS[1:])} or None, given {activation!r}")


def value_of(z: Tensor, activation: str) -> Tensor:
    """``activate(z)`` also of infinity, of which torch's gelu is NaN where it computes in vectors."""
    value = activate(z, activation)
    return torch.where(z == torch.inf, z, value) if activation == "gelu" else value


def activation_gradient(grad: Tensor, saved: Tensor, activation: str, of_value: bool) -> Tensor:
    """``grad * activate'(z)``, where ``saved`` is ``activate(z)`` if ``of_value`` (:func:`from_value`), else ``z``."""
    if activation == "":
        return grad
    if activation == "relu":
        return grad.masked_fill(saved <= 0, 0.0)
    if activation == "tanh":
        return grad * (1 - (saved if of_value else torch.tanh(saved)).square())
    if activation == "gelu":
        density = torch.exp(-0.5 * saved * saved) * (2 * torch.pi) ** -0.5
        return grad * (0.5 * (1 + torch.erf(saved * 2**-0.5)) + saved * density)
    if activation == "gelu_tanh":
        factor = (2 / torch.pi) ** 0.5
        tanh = torch.tanh(factor * (saved + 0.044715 * saved**3))
        slope = factor * (1 + 3 * 0.044715 * saved * saved)
        return grad * (0.5 * (1 + tanh) + 0.5 * saved * (1 - tanh * tanh) * slope)
    rate = 1.702 if activation == "quick_gelu" else 1.0
    sigmoid = torch.sigmoid(rate * saved)
    return grad * sigmoid * (1 + rate * saved * (1 - sigmoid))


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str = "",
    residual: Tensor | None = None,
) -> Tensor:
    """``activate(x weight^T + bias) + residual``."""
    z = x @ weight.transpose(0, 1)
    if bias is not None:
        z = z + bias
    out = value_of(z, activation)
    return out if residual is None else out + residual
