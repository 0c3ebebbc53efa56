"""Modules that join two modalities."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from velm_kernels import checks
from velm_kernels.constructors import checked
from velm_kernels.fusion.bilinear import bilinear
from velm_kernels.fusion.inputs import MOST_INPUTS
from velm_kernels.fusion.low_rank_fusion import low_rank_fusion
from velm_kernels.fusion.tensor_fusion import tensor_fusion
from velm_kernels.layout import leading_dims


class Bilinear(nn.Bilinear):
    """``torch.nn.Bilinear`` on :func:`velm_kernels.bilinear`: constructor, state_dict, initialisation and result are
    the same.

    Args:
        in1_features, in2_features, out_features, bias, device, dtype: as in ``torch.nn.Bilinear``.

    Shape:
        ``(..., in1_features)`` and ``(..., in2_features)`` to ``(..., out_features)``. Leading dimensions broadcast,
        and ``(batch, in1_features)`` goes with ``(batch, regions, in2_features)`` too.

    Inputs have the dtype of the parameters: float32, bfloat16, float16, or float64 (computed by the reference backend);
    under autocast float32, bfloat16 or float16, whatever the parameters have.

    Raises:
        TypeError: an argument has a wrong type; from forward: an input is not a floating-point tensor of the
            parameters' dtype (under autocast, of float32, bfloat16 or float16).
        ValueError: an argument is out of range; from forward: features or leading dimensions do not fit.

    Example:
        >>> layer = velm_kernels.Bilinear(32, 48, 16)
        >>> layer(torch.randn(4, 32), torch.randn(4, 48)).shape
        torch.Size([4, 16])
    """

    @checked()
    def __init__(
        self,
        in1_features: int,
        in2_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in1_features, in2_features, out_features, bias, device=device, dtype=dtype)

    def forward(self, input1: Tensor, input2: Tensor) -> Tensor:
        checks.features("input1", input1, "(..., in1_features)", self.in1_features, self.weight)
        checks.features("input2", input2, "(..., in2_features)", self.in2_features, self.weight)
        checks.leading("input2", input2, "input1", input1, leading_dims((input1, input2))[0], input2.shape[:-1])
        return bilinear(input1, input2, self.weight, self.bias)


def _checked_dims(input_dims: Sequence[int]) -> list[int]:
    dims = list(input_dims)
    if not 2 <= len(dims) <= MOST_INPUTS:
        raise ValueError(f"input_dims: expected 2 to {MOST_INPUTS} sizes, given {checks.describe(dims)}")
    return dims


def _check_inputs(inputs: Sequence[Tensor], dims: Sequence[int], like: Tensor) -> None:
    if len(inputs) != len(dims):
        raise ValueError(f"inputs: expected {len(dims)} tensors, given {len(inputs)}")
    for m, (x, dim) in enumerate(zip(inputs, dims, strict=True)):
        checks.features(f"inputs[{m}]", x, "(..., d)", dim, like)


class TensorFusion(nn.Module):
    """A linear layer on the outer product of ``[1; x]`` over modalities: :func:`velm_kernels.tensor_fusion`.

    Args:
        input_dims: features of each of 2 to 4 modalities.
        out_features: features of the result.
        bias: whether there is one.
        device, dtype: of the parameters.

    Parameters are ``weight (out_features, prod(1 + d))`` and ``bias (out_features,)``, initialised as those of
    ``torch.nn.Linear``.

    Shape:
        one ``(..., d)`` a modality to ``(..., out_features)``.

    Inputs have the dtype of the parameters: float32, bfloat16, float16, or float64 (computed by the reference backend);
    under autocast float32, bfloat16 or float16, whatever the parameters have.

    Raises:
        TypeError: an argument has a wrong type; from forward: an input is not a floating-point tensor of the
            parameters' dtype (under autocast, of float32, bfloat16 or float16).
        ValueError: an argument is out of range, or there are not 2 to 4 modalities; from forward: the number of inputs,
            features or leading dimensions do not fit.

    Example:
        >>> fusion = velm_kernels.TensorFusion([8, 8, 16], out_features=32)
        >>> fusion(torch.randn(4, 8), torch.randn(4, 8), torch.randn(4, 16)).shape
        torch.Size([4, 32])
    """

    @checked()
    def __init__(
        self,
        input_dims: Sequence[int],
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.input_dims = _checked_dims(input_dims)
        features = math.prod(1 + dim for dim in self.input_dims)
        self.weight = nn.Parameter(torch.empty(out_features, features, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        bound = self.weight.shape[1] ** -0.5
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)

    def forward(self, *inputs: Tensor) -> Tensor:
        _check_inputs(inputs, self.input_dims, self.weight)
        return tensor_fusion(inputs, self.weight, self.bias)

    def extra_repr(self) -> str:
        return f"{self.input_dims}, out_features={self.weight.shape[0]}, bias={self.bias is not None}"


class LowRankFusion(nn.Module):
    """:class:`TensorFusion` with a weight of low rank: :func:`velm_kernels.low_rank_fusion`.

    Args:
        input_dims: features of each of 2 to 4 modalities.
        out_features: features of the result.
        rank: how many products of projections are summed.
        bias: whether there is one.
        device, dtype: of the parameters.

    Parameters are ``factors.m (rank, 1 + d_m, out_features)``, ``weight (rank,)`` and ``bias (out_features,)``;
    initialised as by the authors: the factors and the weight by Xavier's normal distribution, the bias 0.

    Shape:
        one ``(..., d)`` a modality to ``(..., out_features)``.

    Inputs have the dtype of the parameters: float32, bfloat16, float16, or float64 (computed by the reference backend);
    under autocast float32, bfloat16 or float16, whatever the parameters have.

    Raises:
        TypeError: an argument has a wrong type; from forward: an input is not a floating-point tensor of the
            parameters' dtype (under autocast, of float32, bfloat16 or float16).
        ValueError: an argument is out of range, or there are not 2 to 4 modalities; from forward: the number of inputs,
            features or leading dimensions do not fit.

    Example:
        >>> fusion = velm_kernels.LowRankFusion([8, 8, 16], out_features=32, rank=4)
        >>> fusion(torch.randn(4, 8), torch.randn(4, 8), torch.randn(4, 16)).shape
        torch.Size([4, 32])
    """

    @checked(rank=1)
    def __init__(
        self,
        input_dims: Sequence[int],
        out_features: int,
        rank: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.input_dims = _checked_dims(input_dims)
        shapes = [(rank, 1 + dim, out_features) for dim in self.input_dims]
        self.factors = nn.ParameterList([torch.empty(shape, device=device, dtype=dtype) for shape in shapes])
        self.weight = nn.Parameter(torch.empty(rank, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for factor in self.factors:
            nn.init.xavier_normal_(factor)
        nn.init.xavier_normal_(self.weight[None])
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, *inputs: Tensor) -> Tensor:
        _check_inputs(inputs, self.input_dims, self.weight)
        return low_rank_fusion(inputs, list(self.factors), self.weight, self.bias)

    def extra_repr(self) -> str:
        return f"{self.input_dims}, out_features={self.factors[0].shape[2]}, rank={self.weight.shape[0]}"
