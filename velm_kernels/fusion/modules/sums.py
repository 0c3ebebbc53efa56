"""Fusions of two modalities by a sum of their projections."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from velm_kernels import checks
from velm_kernels.constructors import checked
from velm_kernels.fusion.dropout_residual import dropout_residual
from velm_kernels.fusion.modules.pair import (
    PairFusion,
    checked_activation,
    checked_dims,
    checked_pair,
    project,
    root_and_norm,
)
from velm_kernels.linear.linear import linear
from velm_kernels.listeners import is_bare


class LinearSum(PairFusion):
    """The sum of the projections of two modalities, normalised where asked for, and projected: a baseline of
    Ben-younes et al. (2019).

    Constructor and state_dict (``linear0``, ``linear1``, ``linear_out``) are those of ``LinearSum`` in
    block-bootstrap-pytorch 0.1.6, and so is the result; unlike there, inputs may have more than two dimensions.

    Args:
        input_dims: features of the two modalities.
        output_dim: features of the result.
        mm_dim: features of the projections.
        activ_input, activ_output: name of a function of ``torch.nn.functional`` after the input and the output
            projections; empty or None for none.
        normalize: signed square root and L2 norm before the output projection.
        dropout_input, dropout_pre_lin, dropout_output: probabilities, after the input projections, before and after
            the output projection, in training.

    Shape:
        a pair ``(..., d_0)`` and ``(..., d_1)`` to ``(..., output_dim)``. Leading dimensions broadcast, and
        ``(batch, d)`` goes with ``(batch, regions, d)``.

    Inputs have the dtype of the parameters: float32, bfloat16, float16, or float64 (computed by the reference backend);
    under autocast float32, bfloat16 or float16, whatever the parameters have.

    Raises:
        TypeError: an argument has a wrong type; from forward: not two floating-point tensors of the parameters' dtype
            (under autocast, of float32, bfloat16 or float16).
        ValueError: an argument is out of range, or a name unknown; from forward: other features than
            ``input_dims``, or leading dimensions that do not broadcast.

    Example:
        >>> fusion = velm_kernels.LinearSum([300, 512], output_dim=64, mm_dim=100)
        >>> fusion([torch.randn(16, 300), torch.randn(16, 512)]).shape
        torch.Size([16, 64])
    """

    @checked()
    def __init__(
        self,
        input_dims: Sequence[int],
        output_dim: int,
        mm_dim: int = 1200,
        activ_input: str | None = "relu",
        activ_output: str | None = "relu",
        normalize: bool = False,
        dropout_input: float = 0.0,
        dropout_pre_lin: float = 0.0,
        dropout_output: float = 0.0,
    ) -> None:
        super().__init__(
            input_dims,
            output_dim,
            mm_dim,
            activ_input,
            activ_output,
            dropout_input,
            dropout_pre_lin,
            dropout_output,
        )
        self.normalize = normalize
        self.make_linears(mm_dim, mm_dim)

    def fuse(self, a: Tensor, b: Tensor) -> Tensor:
        return root_and_norm(a + b) if self.normalize else a + b


class ConcatMLP(nn.Module):
    """A multi-layer perceptron on two modalities side by side: a baseline of Ben-younes et al. (2019).

    Constructor and state_dict (``mlp.linears.<layer>``) are those of ``ConcatMLP`` in block-bootstrap-pytorch 0.1.6,
    and so is the result; unlike there, ``(batch, d)`` goes with ``(batch, regions, d)``. Its part of the first layer
    is then computed once for an entry, not once for a region.

    Args:
        input_dims: features of the two modalities.
        output_dim: features of the result.
        dimensions: features of the layers in between.
        activation: name of a function of ``torch.nn.functional`` after these layers.
        dropout: probability of dropout after these layers, in training.

    Shape:
        a pair ``(..., d_0)`` and ``(..., d_1)`` to ``(..., output_dim)``. Leading dimensions broadcast.

    Inputs have the dtype of the parameters: float32, bfloat16, float16, or float64 (computed by the reference backend);
    under autocast float32, bfloat16 or float16, whatever the parameters have.

    Raises:
        TypeError: an argument has a wrong type; from forward: not two floating-point tensors of the parameters' dtype
            (under autocast, of float32, bfloat16 or float16).
        ValueError: an argument is out of range, or a name unknown; from forward: other features than
            ``input_dims``, or leading dimensions that do not broadcast.

    Example:
        >>> fusion = velm_kernels.ConcatMLP([300, 512], output_dim=64, dimensions=[100])
        >>> fusion([torch.randn(16, 300), torch.randn(16, 36, 512)]).shape
        torch.Size([16, 36, 64])
    """

    @checked()
    def __init__(
        self,
        input_dims: Sequence[int],
        output_dim: int,
        dimensions: Sequence[int] = (500, 500),
        activation: str = "relu",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.input_dims, self.output_dim = checked_dims(input_dims), output_dim
        self.dimensions = [*dimensions, output_dim]
        self.activation = checked_activation("activation", activation)
        self.dropout = checks.probability("dropout", dropout)
        sizes = [sum(input_dims), *self.dimensions]
        layers = nn.ModuleList(nn.Linear(*pair) for pair in pairwise(sizes))
        # Under the published names, mlp.linears.<layer>.
        self.mlp = nn.ModuleDict({"linears": layers})

    def forward(self, x: Sequence[Tensor]) -> Tensor:
        a, b = checked_pair(x, self.input_dims)
        first, *others = cast(list[nn.Linear], list(self.mlp["linears"].children()))
        activation = self.activation if others else ""
        if a.shape[:-1] == b.shape[:-1] or not is_bare(first, nn.Linear):
            rows = torch.broadcast_shapes(a.shape[:-1], b.shape[:-1])
            both = [value.expand(*rows, value.shape[-1]) for value in (a, b)]
            z = project(first, torch.cat(both, -1), activation)
        else:
            of_a, of_b = first.weight.split(self.input_dims, 1)
            z = linear(a, of_a, first.bias) + linear(b, of_b)
            z = getattr(F, activation)(z) if activation else z
        for layer in others:
            z = dropout_residual(z, dropout_p=self.dropout) if self.dropout > 0 and self.training else z
            z = project(layer, z, self.activation if layer is not others[-1] else "")
        return z

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}, dropout={self.dropout}"
