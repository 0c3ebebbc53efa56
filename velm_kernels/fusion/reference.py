"""The written meaning of the fusion operators, in plain torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from velm_kernels.attention.philox import philox4x32

BLOCK, COUNTERS = 64, 16
# Least norm that is divided by.
EPS = 1e-12


def kept(seed: Tensor, rows: int, dim: int, dropout_p: float) -> Tensor:
    """Bool ``(rows, dim)``: which elements dropout keeps.

    Element ``(r, c)`` takes word ``c % 64 // 16`` of the counter ``(c // 64 * 16 + c % 16, r, r >> 32, 0)`` and is
    dropped if the word is less than ``dropout_p * 2^32``.
    """
    device = seed.device
    row = torch.arange(rows, dtype=torch.int64, device=device)[:, None]
    column = torch.arange(dim, dtype=torch.int64, device=device)[None, :]
    counter = column // BLOCK * COUNTERS + column % COUNTERS
    high = row >> 32
    words = philox4x32(seed, torch.broadcast_tensors(counter, row & 0xFFFFFFFF, high, torch.zeros_like(high)))
    word = torch.stack(words).gather(0, (column % BLOCK // COUNTERS).expand(1, rows, dim))[0]
    return word >= int(dropout_p * 2**32)


def dropout_residual(x: Tensor, residual: Tensor | None, seed: Tensor, dropout_p: float) -> Tensor:
    """``residual + dropout(x)`` for ``x (rows, dim)``; all arithmetic in the inputs' dtype."""
    rows, dim = x.shape
    dropped = torch.where(kept(seed, rows, dim, dropout_p), x / (1 - dropout_p), x.new_zeros(()))
    return dropped if residual is None else residual + dropped


def bilinear(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``z[..., k] = sum_ij x[..., i] weight[k, i, j] y[..., j] + bias[k]``."""
    out = torch.einsum("...i,kij,...j->...k", x, weight, y)
    return out if bias is None else out + bias


def factorized_sums(
    a: Tensor, b: Tensor, factor: int, layout: str, dropout_p: float, seed: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """The sums over the factor of ``a * b``, and which products dropout keeps, if there is any."""
    product, keep = a * b, None
    if seed is not None:
        keep = kept(seed, product[..., 0].numel(), product.shape[-1], dropout_p).view(product.shape)
        product = torch.where(keep, product / (1 - dropout_p), product.new_zeros(()))
    if layout == "inner":
        return product.unflatten(-1, (product.shape[-1] // factor, factor)).sum(-1), keep
    return product.unflatten(-1, (factor, product.shape[-1] // factor)).sum(-2), keep


def factorized_pool(
    a: Tensor,
    b: Tensor,
    factor: int = 1,
    layout: str = "inner",
    power_norm: bool = False,
    l2_norm: bool = False,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """``normalize(signed_sqrt(sum over the factor of dropout(a * b)))``, the last two where asked for."""
    z, _ = factorized_sums(a, b, factor, layout, dropout_p, seed)
    # The derivatives are 0 where those of the formulas are infinite: at sums of 0, and at rows of them.
    if power_norm:
        z = torch.where(z == 0, 0.0, z.sign() * torch.where(z == 0, 1.0, z.abs()).sqrt())
    if not l2_norm:
        return z
    some = (z != 0).any(-1, keepdim=True)
    return torch.where(some, torch.nn.functional.normalize(torch.where(some, z, 1.0), dim=-1, eps=EPS), 0.0)


def factorized_pool_gradient(
    grad: Tensor,
    a: Tensor,
    b: Tensor,
    factor: int,
    layout: str,
    power_norm: bool,
    l2_norm: bool,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The gradients of a and b, finite where those of the formula above are not: the gradient of a sum is 0 where the
    sum is 0 under the root or its row under the norm, and no more than the largest number elsewhere."""
    z, keep = factorized_sums(a, b, factor, layout, dropout_p, seed)
    root = z.sign() * z.abs().sqrt() if power_norm else z
    if l2_norm:
        norm = torch.linalg.vector_norm(root, dim=-1, keepdim=True)
        u = root / norm.clamp_min(EPS)
        # In these orders a norm of NaN stays.
        projected = torch.where(norm <= EPS, 0.0, u * (u * grad).sum(-1, keepdim=True))
        grad = torch.where(norm == 0, 0.0, (grad - projected) / norm.clamp_min(EPS))
    if power_norm:
        grad = torch.where(z == 0, 0.0, grad / (2 * root.abs()))
    largest = torch.finfo(grad.dtype).max
    grad = grad.clamp(-largest, largest)
    if layout == "inner":
        grad = grad.repeat_interleave(factor, -1)
    else:
        grad = grad.repeat(*([1] * (grad.dim() - 1)), factor)
    grad_a, grad_b = grad * b, grad * a
    if keep is None:
        return grad_a, grad_b
    return torch.where(keep, grad_a / (1 - dropout_p), 0.0), torch.where(keep, grad_b / (1 - dropout_p), 0.0)


def tensor_fusion(inputs: Sequence[Tensor], weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``weight ([1; x_1] (x) [1; x_2] (x) ...) + bias``, the outer product formed."""
    outer = with_one(inputs[0])
    for x in inputs[1:]:
        outer = (outer[..., :, None] * with_one(x)[..., None, :]).flatten(-2)
    return torch.nn.functional.linear(outer, weight, bias)


def low_rank_fusion(
    inputs: Sequence[Tensor], factors: Sequence[Tensor], weight: Tensor, bias: Tensor | None = None
) -> Tensor:
    """``sum_r weight[r] * prod_m ([1; x_m] factors[m][r]) + bias``."""
    products: Tensor | None = None
    for x, factor in zip(inputs, factors, strict=True):
        # (..., rank, out)
        projected = torch.einsum("...d,rdo->...ro", with_one(x), factor)
        products = projected if products is None else products * projected
    assert products is not None
    out = torch.einsum("...ro,r->...o", products, weight)
    return out if bias is None else out + bias


def with_one(x: Tensor) -> Tensor:
    """``[1; x]`` along the last dimension."""
    return torch.cat([x.new_ones((*x.shape[:-1], 1)), x], -1)


def film(x: Tensor, gamma: Tensor, beta: Tensor, gamma_offset: float = 0.0) -> Tensor:
    """``(gamma_offset + gamma) * x + beta``, gamma and beta with a dimension of 1 where x has regions or pixels."""
    return (gamma_offset + gamma) * x + beta


def weighted_sum(features: Sequence[Tensor], weights: Tensor) -> Tensor:
    """``sum_i weights[..., i] * features[i]`` for features that broadcast and weights ``(batch, 1, ..., n)``."""
    out = weights[..., 0:1] * features[0]
    for i, value in enumerate(features[1:], 1):
        out = out + weights[..., i : i + 1] * value
    return out


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
