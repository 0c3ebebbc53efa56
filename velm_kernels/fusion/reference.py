"""The written meaning of the fusion operators, in plain torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from velm_kernels.fusion.dropout_residual.reference import dropout_residual as dropout_residual
from velm_kernels.fusion.dropout_residual.reference import kept as kept
from velm_kernels.fusion.factorized_pool.reference import factorized_pool as factorized_pool
from velm_kernels.fusion.factorized_pool.reference import factorized_pool_gradient as factorized_pool_gradient
from velm_kernels.fusion.film.reference import film as film
from velm_kernels.fusion.low_rank_fusion.reference import low_rank_fusion as low_rank_fusion
from velm_kernels.fusion.low_rank_fusion.reference import with_one as with_one
from velm_kernels.fusion.weighted_sum.reference import weighted_sum as weighted_sum


def bilinear(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``z[..., k] = sum_ij x[..., i] weight[k, i, j] y[..., j] + bias[k]``."""
    out = torch.einsum("...i,kij,...j->...k", x, weight, y)
    return out if bias is None else out + bias


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


def _with_pairs(v_live: Tensor, q_live: Tensor) -> tuple[Tensor, Tensor]:
    """The live rows that are in a live pair: none where the other side has none."""
    return v_live & q_live.any(-1, keepdim=True), q_live & v_live.any(-1, keepdim=True)


def bilinear_attention(
    v: Tensor, q: Tensor, h: Tensor, bias: Tensor | None, v_live: Tensor, q_live: Tensor
) -> tuple[Tensor, Tensor]:
    """``softmax over the live pairs (i, j) of sum_k h[g, k] v[b, i, k] q[b, j, k] + bias[g]``, and its logits."""
    v_live, q_live = _with_pairs(v_live, q_live)
    v, q = torch.where(v_live[..., None], v, 0.0), torch.where(q_live[..., None], q, 0.0)
    products = torch.einsum("gk,bik,bjk->bgij", h, v, q)
    pairs = (v_live[:, None, :, None] & q_live[:, None, None]).expand(products.shape)
    logits = products if bias is None else products + bias[:, None, None]
    # A bias shifts all scores of a softmax alike: it has no gradient from there, and is seen only if it is not finite.
    # Where there is no pair, a softmax of other numbers: its gradient is not NaN.
    some = pairs.any(-1).any(-1)[..., None, None]
    scores = products if bias is None else products + bias.detach()[:, None, None]
    scores = torch.where(some, scores.masked_fill(~pairs, -torch.inf), 0.0)
    maps = torch.where(pairs, scores.flatten(2).softmax(-1).view(scores.shape), 0.0)
    return maps, logits.masked_fill(~pairs, -torch.inf)


def bilinear_attention_pool(v: Tensor, q: Tensor, attention: Tensor, v_live: Tensor, q_live: Tensor) -> Tensor:
    """``sum over the live pairs (i, j) of attention[b, g, i, j] v[b, i, k] q[b, j, k]``."""
    v_live, q_live = _with_pairs(v_live, q_live)
    v, q = torch.where(v_live[..., None], v, 0.0), torch.where(q_live[..., None], q, 0.0)
    attention = torch.where(v_live[:, None, :, None] & q_live[:, None, None], attention, 0.0)
    return torch.einsum("bgij,bik,bjk->bgk", attention, v, q)


def count_sketch(x: Tensor, index: Tensor, sign: Tensor, dim: int) -> Tensor:
    """``out[..., j]`` is the sum of ``sign[i] * x[..., i]`` over the i with ``index[i] = j``."""
    return x.new_zeros(*x.shape[:-1], dim).index_add(-1, index, x * sign)


def compact_bilinear(
    x: Tensor, y: Tensor, sketch_x: tuple[Tensor, Tensor], sketch_y: tuple[Tensor, Tensor], dim: int
) -> Tensor:
    """The circular convolution of the count sketches of x and y, through their Fourier transforms."""
    a, b = (torch.fft.rfft(count_sketch(v, i, s.to(v.dtype), dim)) for v, (i, s) in ((x, sketch_x), (y, sketch_y)))
    return torch.fft.irfft(a * b, n=dim)
