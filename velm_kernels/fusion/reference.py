"""The written meaning of the fusion operators, in plain torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from velm_kernels.fusion.bilinear.reference import bilinear as bilinear
from velm_kernels.fusion.bilinear_attention.reference import bilinear_attention as bilinear_attention
from velm_kernels.fusion.bilinear_attention.reference import bilinear_attention_pool as bilinear_attention_pool
from velm_kernels.fusion.dropout_residual.reference import dropout_residual as dropout_residual
from velm_kernels.fusion.dropout_residual.reference import kept as kept
from velm_kernels.fusion.factorized_pool.reference import factorized_pool as factorized_pool
from velm_kernels.fusion.factorized_pool.reference import factorized_pool_gradient as factorized_pool_gradient
from velm_kernels.fusion.film.reference import film as film
from velm_kernels.fusion.low_rank_fusion.reference import low_rank_fusion as low_rank_fusion
from velm_kernels.fusion.low_rank_fusion.reference import with_one as with_one
from velm_kernels.fusion.weighted_sum.reference import weighted_sum as weighted_sum


def tensor_fusion(inputs: Sequence[Tensor], weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``weight ([1; x_1] (x) [1; x_2] (x) ...) + bias``, the outer product formed."""
    outer = with_one(inputs[0])
    for x in inputs[1:]:
        outer = (outer[..., :, None] * with_one(x)[..., None, :]).flatten(-2)
    return torch.nn.functional.linear(outer, weight, bias)


def outer_product_fusion(x: Tensor, y: Tensor, mask: Tensor | None = None) -> Tensor:
    """``x y^T``, summed over the regions of ``(batch, regions, d)`` that the mask leaves."""
    if x.dim() == 2:
        return x[:, :, None] * y[:, None, :]
    if mask is not None:
        x, y = (torch.where(mask[..., None], value, 0.0) for value in (x, y))
    return (x[:, :, :, None] * y[:, :, None, :]).sum(1)


def count_sketch(x: Tensor, index: Tensor, sign: Tensor, dim: int) -> Tensor:
    """``out[..., j]`` is the sum of ``sign[i] * x[..., i]`` over the i with ``index[i] = j``."""
    return x.new_zeros(*x.shape[:-1], dim).index_add(-1, index, x * sign)


def compact_bilinear(
    x: Tensor, y: Tensor, sketch_x: tuple[Tensor, Tensor], sketch_y: tuple[Tensor, Tensor], dim: int
) -> Tensor:
    """The circular convolution of the count sketches of x and y, through their Fourier transforms."""
    a, b = (torch.fft.rfft(count_sketch(v, i, s.to(v.dtype), dim)) for v, (i, s) in ((x, sketch_x), (y, sketch_y)))
    return torch.fft.irfft(a * b, n=dim)
