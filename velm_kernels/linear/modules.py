"""Modules built on :func:`velm_kernels.linear`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from velm_kernels import checks
from velm_kernels.constructors import checked
from velm_kernels.linear.linear import linear
from velm_kernels.linear.linear.reference import ACTIVATIONS, activate
from velm_kernels.listeners import is_bare


def apply_linear(layer: nn.Module, x: Tensor, activation: str = "", residual: Tensor | None = None) -> Tensor:
    """``activation(layer(x)) + residual``, in one pass where ``layer`` is a ``torch.nn.Linear`` and nothing more.

    Else the layer is called as what it is: with hooks, an adapter around it, parametrised, sharded, or quantised to a
    module of another class. ``activation`` is a name as in :class:`Linear`, or empty.
    """
    if is_bare(layer, nn.Linear):
        return linear(x, layer.weight, layer.bias, activation or None, residual)  # type: ignore[arg-type]
    out = activate(layer(x), activation)
    return out if residual is None else out + residual


class Linear(nn.Linear):
    """``torch.nn.Linear`` with its activation and residual fused in: ``activation(x W^T + b) + residual``.

    Parameters, state_dict and initialisation are those of ``torch.nn.Linear``, and so is the result without
    ``activation`` and ``residual``.

    Args:
        in_features, out_features, bias, device, dtype: as in ``torch.nn.Linear``.
        activation: None, "relu", "gelu", "gelu_tanh", "quick_gelu", "silu" or "tanh".

    Shape:
        ``(..., in_features)`` and, if given, residual ``(..., out_features)`` to ``(..., out_features)``.

    Inputs have the dtype of the parameters: float32, bfloat16, float16, or float64 (computed by the reference backend);
    under autocast float32, bfloat16 or float16, whatever the parameters have.

    Raises:
        TypeError: an argument has a wrong type; from forward: an input is not a floating-point tensor of the
            parameters' dtype (under autocast, of float32, bfloat16 or float16; ``residual`` may have another floating
            dtype).
        ValueError: an argument is out of range, or ``activation`` unknown; from forward: features or the shape of
            ``residual`` do not fit.

    Example:
        >>> up = velm_kernels.Linear(64, 256, activation="gelu")
        >>> up(torch.randn(2, 10, 64)).shape
        torch.Size([2, 10, 256])
    """

    @checked()
    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        activation: str | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self.activation = checks.choice("activation", activation, ACTIVATIONS[1:], or_none=True)

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        checks.features("input", input, "(..., in_features)", self.in_features)
        return linear(input, self.weight, self.bias, self.activation, residual)

    def extra_repr(self) -> str:
        return super().extra_repr() + (f", activation={self.activation!r}" if self.activation else "")


class MLP(nn.Module):
    """The feed-forward block of a transformer layer: ``down(activation(up(x)))``, plus ``residual`` if given.

    Args:
        dim: features of the input and of the output.
        hidden_dim: features between the two projections, by default ``4 * dim``.
        activation: as in :class:`Linear`, applied after ``up``.
        bias, device, dtype: of both projections, as in ``torch.nn.Linear``.

    Shape:
        ``(..., dim)`` and, if given, residual ``(..., dim)`` to ``(..., dim)``.

    Inputs have the dtype of the parameters: float32, bfloat16, float16, or float64 (computed by the reference backend);
    under autocast float32, bfloat16 or float16, whatever the parameters have.

    The block is the position-wise feed-forward network of Vaswani et al. (2017, section 3.3).

    Raises:
        TypeError: an argument has a wrong type; from forward: an input is not a floating-point tensor of the
            parameters' dtype (under autocast, of float32, bfloat16 or float16; ``residual`` may have another floating
            dtype).
        ValueError: an argument is out of range, or ``activation`` unknown; from forward: features or the shape of
            ``residual`` do not fit.

    Example:
        >>> block = velm_kernels.MLP(64, activation="gelu_tanh")
        >>> x = torch.randn(2, 10, 64)
        >>> block(x, residual=x).shape
        torch.Size([2, 10, 64])
    """

    @checked()
    def __init__(
        self,
        dim: int,
        hidden_dim: int | None = None,
        activation: str | None = "gelu",
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        options: dict[str, Any] = {"bias": bias, "device": device, "dtype": dtype}
        self.dim, hidden = dim, 4 * dim if hidden_dim is None else hidden_dim
        self.up = Linear(dim, hidden, activation=activation, **options)
        self.down = Linear(hidden, dim, **options)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        checks.features("x", x, "(..., dim)", self.dim)
        out: Tensor = self.down(self.up(x), residual)
        return out
