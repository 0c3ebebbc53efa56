"""Fusions of two modalities by a product of their projections."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from velm_kernels.fusion.dropout import dropout_residual
from velm_kernels.fusion.factorized import factorized_pool
from velm_kernels.linear import linear
from velm_kernels.linear.reference import ACTIVATIONS


def _project(layer: nn.Linear, x: Tensor, activation: str) -> Tensor:
    """The layer with an activation of ``torch.nn.functional``, in one pass where it is one of ours."""
    if activation and activation not in ACTIVATIONS:
        out: Tensor = getattr(F, activation)(linear(x, layer.weight, layer.bias))
        return out
    return linear(x, layer.weight, layer.bias, activation or None)


class MFB(nn.Module):
    """Multi-modal factorised bilinear pooling (Yu et al., 2017): projections of two modalities are multiplied, summed
    over ``factor`` neighbours, normalised where asked for, and projected. The tail is
    :func:`velm_kernels.factorized_pool`.

    Constructor and state_dict (``linear0``, ``linear1``, ``linear_out``) are those of ``MFB`` in
    block-bootstrap-pytorch 0.1.6, and so is the result; unlike there, inputs may have more than two dimensions.

    Args:
        input_dims: features of the two modalities.
        output_dim: features of the result.
        mm_dim: features after the sum.
        factor: products in a sum.
        activ_input, activ_output: name of a function of ``torch.nn.functional`` after the input and the output
            projections; empty or None for none.
        normalize: signed square root and L2 norm before the output projection.
        dropout_input, dropout_pre_norm, dropout_output: probabilities, after the input projections, of the products
            and of the result, in training.

    Shape:
        a pair ``(..., d_0)`` and ``(..., d_1)`` to ``(..., output_dim)``. Leading dimensions broadcast, and
        ``(batch, d)`` goes with ``(batch, regions, d)``.
    """

    dropout_pre_lin = 0.0

    def __init__(
        self,
        input_dims: Sequence[int],
        output_dim: int,
        mm_dim: int = 1200,
        factor: int = 2,
        activ_input: str | None = "relu",
        activ_output: str | None = "relu",
        normalize: bool = False,
        dropout_input: float = 0.0,
        dropout_pre_norm: float = 0.0,
        dropout_output: float = 0.0,
    ) -> None:
        super().__init__()
        if len(input_dims) != 2:
            raise ValueError(f"input_dims: expected 2 sizes, given {list(input_dims)}")
        self.input_dims, self.output_dim = list(input_dims), output_dim
        self.mm_dim, self.factor = mm_dim, factor
        self.activ_input, self.activ_output = activ_input or "", activ_output or ""
        self.normalize = normalize
        self.dropout_input, self.dropout_pre_norm, self.dropout_output = dropout_input, dropout_pre_norm, dropout_output
        self.linear0 = nn.Linear(input_dims[0], mm_dim * factor)
        self.linear1 = nn.Linear(input_dims[1], mm_dim * factor)
        self.linear_out = nn.Linear(mm_dim, output_dim)

    def forward(self, x: Sequence[Tensor]) -> Tensor:
        if len(x) != 2:
            raise ValueError(f"x: expected a pair of tensors, given {len(x)}")
        layers = (self.linear0, self.linear1)
        a, b = (
            self._dropped(_project(layer, value, self.activ_input), self.dropout_input)
            for layer, value in zip(layers, x, strict=True)
        )
        if {a.dim(), b.dim()} == {2, 3}:
            a, b = (value[:, None] if value.dim() == 2 else value for value in (a, b))
        dropout_p = self.dropout_pre_norm if self.training else 0.0
        z = factorized_pool(a, b, self.factor, "inner", self.normalize, self.normalize, dropout_p)
        z = self._dropped(z, self.dropout_pre_lin)
        return self._dropped(_project(self.linear_out, z, self.activ_output), self.dropout_output)

    def _dropped(self, x: Tensor, p: float) -> Tensor:
        return dropout_residual(x, dropout_p=p) if p > 0 and self.training else x

    def extra_repr(self) -> str:
        return f"factor={self.factor}, normalize={self.normalize}"


class MLB(MFB):
    """Multi-modal low-rank bilinear pooling (Kim et al., 2017): :class:`MFB` with one product a feature.

    Constructor and state_dict are those of ``MLB`` in block-bootstrap-pytorch 0.1.6.

    Args:
        dropout_pre_lin: probability of dropout after the normalisation, in training.
        others: as in :class:`MFB`.

    Shape:
        as in :class:`MFB`.
    """

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
            input_dims, output_dim, mm_dim, 1, activ_input, activ_output, normalize, dropout_input, 0.0, dropout_output
        )
        self.dropout_pre_lin = dropout_pre_lin
