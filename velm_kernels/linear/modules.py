"""Modules built on :func:`velm_kernels.linear`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from velm_kernels.linear.ops import linear
from velm_kernels.linear.reference import ACTIVATIONS


def _checked_activation(activation: str | None) -> str | None:
    if activation is not None and activation not in ACTIVATIONS[1:]:
        raise ValueError(f"activation: expected one of {', '.join(ACTIVATIONS[1:])} or None, given {activation!r}")
    return activation


class Linear(nn.Linear):
    """``torch.nn.Linear`` with its activation and residual fused in: ``activation(x W^T + b) + residual``.

    Parameters, state_dict and initialisation are those of ``torch.nn.Linear``, and so is the result without
    ``activation`` and ``residual``.

    Args:
        in_features, out_features, bias, device, dtype: as in ``torch.nn.Linear``.
        activation: None, "relu", "gelu", "gelu_tanh", "quick_gelu", "silu" or "tanh".

    Shape:
        ``(..., in_features)`` and, if given, residual ``(..., out_features)`` to ``(..., out_features)``.
    """

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
        self.activation = _checked_activation(activation)

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
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
    """

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
        hidden = 4 * dim if hidden_dim is None else hidden_dim
        self.up = Linear(dim, hidden, activation=activation, **options)
        self.down = Linear(hidden, dim, **options)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        out: Tensor = self.down(self.up(x), residual)
        return out
