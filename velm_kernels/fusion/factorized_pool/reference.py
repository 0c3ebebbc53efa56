"""The written meaning of factorized_pool, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from velm_kernels.fusion.dropout_residual.reference import kept

# Least norm that is divided by.
EPS = 1e-12


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
    sum is 0 under the root or its row under the norm, and no more than the largest number elsewhere. What comes in
    infinite stays so."""
    z, keep = factorized_sums(a, b, factor, layout, dropout_p, seed)
    root = z.sign() * z.abs().sqrt() if power_norm else z
    # Not ``torch.where`` of two numbers: these would be float32.
    largest = torch.full_like(grad, torch.finfo(grad.dtype).max).masked_fill(~grad.isfinite(), torch.inf)
    if l2_norm:
        norm = torch.linalg.vector_norm(root, dim=-1, keepdim=True)
        u = root / norm.clamp_min(EPS)
        # In these orders a norm of NaN stays.
        along = (u * grad).sum(-1, keepdim=True)
        projected = torch.where(norm <= EPS, 0.0, u * along)
        largest = torch.where(along.isfinite(), largest, torch.inf)
        grad = torch.where(norm == 0, 0.0, (grad - projected) / norm.clamp_min(EPS))
    if power_norm:
        grad = torch.where(z == 0, 0.0, grad / (2 * root.abs()))
    grad = grad.clamp(-largest, largest)
    if layout == "inner":
        grad = grad.repeat_interleave(factor, -1)
    else:
        grad = grad.repeat(*([1] * (grad.dim() - 1)), factor)
    grad_a, grad_b = grad * b, grad * a
    if keep is None:
        return grad_a, grad_b
    return torch.where(keep, grad_a / (1 - dropout_p), 0.0), torch.where(keep, grad_b / (1 - dropout_p), 0.0)
