"""The bilinear form of one row of x with many regions of y, and the reference of both cases."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from velm_kernels.backends.library import autograd_inside
from velm_kernels.fusion import reference

GRAD_X, GRAD_Y, GRAD_WEIGHT, GRAD_BIAS = 1, 2, 4, 8
# Elements of x W that exist at a time.
WORKSPACE = 1 << 22


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def reference_forward(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    wide = _wide(x)
    x = x[:, None] if y.dim() == 3 else x
    out = reference.bilinear(x.to(wide), y.to(wide), weight.to(wide), None if bias is None else bias.to(wide))
    return out.to(y.dtype).contiguous()


def reference_backward(
    grad: Tensor, x: Tensor, y: Tensor, weight: Tensor, grad_mask: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    wide = _wide(x)
    wanted = [bool(grad_mask & bit) for bit in (GRAD_X, GRAD_Y, GRAD_WEIGHT, GRAD_BIAS)]
    values = (x, y, weight, weight.new_zeros(weight.shape[:1]))
    with autograd_inside():
        leaves = [value.detach().to(wide).requires_grad_(want) for value, want in zip(values, wanted, strict=True)]
        rows = leaves[0][:, None] if y.dim() == 3 else leaves[0]
        out = reference.bilinear(rows, *leaves[1:])
        chosen = [leaf for leaf, want in zip(leaves, wanted, strict=True) if want]
        found = iter(torch.autograd.grad(out, chosen, grad.to(wide)))
    return tuple(next(found).to(x.dtype).contiguous() if want else x.new_empty((0,)) for want in wanted)  # type: ignore[return-value]


def _pieces(x: Tensor, weight: Tensor) -> Iterator[slice]:
    """Ranges of outputs for which x W stays within the workspace."""
    out, _, dy = weight.shape
    step = max(1, WORKSPACE // max(1, max(x.shape[0], x.shape[1]) * dy))
    return (slice(k, min(k + step, out)) for k in range(0, out, step))


def _arithmetic(x: Tensor) -> torch.dtype:
    """CPUs multiply matrices of half precision slowly or round what is summed; GPUs accumulate in float32."""
    return x.dtype if x.is_cuda else _wide(x)


def forward(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`velm::folded_bilinear_forward`: x W for some outputs at a time, then its product with the regions."""
    dtype = _arithmetic(x)
    x, wide_y = x.to(dtype), y.to(dtype)
    z = y.new_empty((*y.shape[:2], weight.shape[0]))
    for piece in _pieces(x, weight):
        # (outputs, batch, dy) -> (batch, dy, outputs)
        folded = torch.matmul(x, weight[piece].to(dtype)).permute(1, 2, 0)
        part = wide_y @ folded
        z[..., piece] = part if bias is None else part + bias[piece].to(dtype)
    return z


def backward(
    grad: Tensor, x: Tensor, y: Tensor, weight: Tensor, grad_mask: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`velm::folded_bilinear_backward`, through the gradient of x W for the same outputs at a time."""
    dtype = _arithmetic(x)
    wide_x, wide_y = x.to(dtype), y.to(dtype)
    sums = torch.promote_types(dtype, torch.float32)
    grad_x = x.new_zeros(x.shape if grad_mask & GRAD_X else (0,), dtype=sums)
    grad_y = y.new_zeros(y.shape if grad_mask & GRAD_Y else (0,), dtype=sums)
    grad_weight = x.new_empty(weight.shape if grad_mask & GRAD_WEIGHT else (0,))
    for piece in _pieces(x, weight):
        part, g = weight[piece].to(dtype), grad[..., piece].to(dtype)
        if grad_mask & GRAD_Y:
            # (outputs, batch, dy) -> (batch, outputs, dy)
            grad_y += g @ torch.matmul(wide_x, part).transpose(0, 1)
        if grad_mask & (GRAD_X | GRAD_WEIGHT):
            # (batch, outputs, dy) -> (outputs, batch, dy)
            grad_folded = (g.transpose(1, 2) @ wide_y).transpose(0, 1)
            if grad_mask & GRAD_X:
                grad_x += torch.matmul(grad_folded, part.transpose(1, 2)).sum(0)
            if grad_mask & GRAD_WEIGHT:
                grad_weight[piece] = torch.matmul(wide_x.transpose(0, 1), grad_folded)
    grad_bias = grad.sum((0, 1), dtype=sums).to(x.dtype) if grad_mask & GRAD_BIAS else x.new_empty((0,))
    return grad_x.to(x.dtype), grad_y.to(x.dtype), grad_weight, grad_bias
