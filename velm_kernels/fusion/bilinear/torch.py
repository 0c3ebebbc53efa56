"""The bilinear form by products of torch: of rows its own operator, and one row of x with several of y."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

# Elements of x W, and of the weight in another dtype, that exist at a time.
WORKSPACE = 1 << 22

Optional = Tensor | None


def _pieces(outputs: int, elements: int) -> Iterator[slice]:
    """Ranges of outputs for which so many elements of each stay within the workspace."""
    step = max(1, WORKSPACE // max(1, elements))
    return (slice(k, min(k + step, outputs)) for k in range(0, outputs, step))


def bilinear_forward(x: Tensor, y: Tensor, weight: Tensor, bias: Optional, out: Tensor) -> None:
    # It goes from output to output.
    out.copy_(F.bilinear(x, y, weight, bias))


def bilinear_backward(
    grad: Tensor,
    x: Tensor,
    y: Tensor,
    weight: Tensor,
    grad_x: Optional,
    grad_y: Optional,
    grad_weight: Optional,
    grad_bias: Optional,
) -> None:
    for to in (grad_x, grad_y):
        if to is not None:
            to.zero_()
    for piece in _pieces(weight.shape[0], x.shape[0] * max(x.shape[1], y.shape[1])):
        # (outputs, rows, 1)
        g, part = grad[:, piece].t()[:, :, None], weight[piece]
        if grad_x is not None:
            grad_x += (g * torch.matmul(y, part.transpose(1, 2))).sum(0)
        if grad_y is not None:
            grad_y += (g * torch.matmul(x, part)).sum(0)
        if grad_weight is not None:
            grad_weight[piece] = torch.matmul((g * x).transpose(1, 2), y)
    if grad_bias is not None:
        torch.sum(grad, 0, out=grad_bias)


def _arithmetic(x: Tensor) -> torch.dtype:
    """CPUs multiply matrices of half precision slowly or round what is summed; GPUs accumulate in float32."""
    return x.dtype if x.is_cuda else torch.promote_types(x.dtype, torch.float32)


def folded_bilinear_forward(x: Tensor, y: Tensor, weight: Tensor, bias: Optional, out: Tensor) -> None:
    """x W for some outputs at a time, then its product with the regions."""
    dtype = _arithmetic(x)
    x, cast_y = x.to(dtype), y.to(dtype)
    for piece in _pieces(weight.shape[0], max(x.shape) * y.shape[2]):
        # (outputs, batch, dy) -> (batch, dy, outputs)
        folded = torch.matmul(x, weight[piece].to(dtype)).permute(1, 2, 0)
        part = cast_y @ folded
        out[..., piece] = part if bias is None else part + bias[piece].to(dtype)


def folded_bilinear_backward(
    grad: Tensor,
    x: Tensor,
    y: Tensor,
    weight: Tensor,
    grad_x: Optional,
    grad_y: Optional,
    grad_weight: Optional,
    grad_bias: Optional,
) -> None:
    """Through the gradient of x W for the same outputs at a time."""
    dtype = _arithmetic(x)
    cast_x, cast_y = x.to(dtype), y.to(dtype)
    sums = torch.promote_types(dtype, torch.float32)
    sum_x, sum_y = (None if to is None else to.new_zeros(to.shape, dtype=sums) for to in (grad_x, grad_y))
    for piece in _pieces(weight.shape[0], max(x.shape) * y.shape[2]):
        part, g = weight[piece].to(dtype), grad[..., piece].to(dtype)
        if sum_y is not None:
            # (outputs, batch, dy) -> (batch, outputs, dy)
            sum_y += g @ torch.matmul(cast_x, part).transpose(0, 1)
        if sum_x is not None or grad_weight is not None:
            # (batch, outputs, dy) -> (outputs, batch, dy)
            grad_folded = (g.transpose(1, 2) @ cast_y).transpose(0, 1)
            if sum_x is not None:
                sum_x += torch.matmul(grad_folded, part.transpose(1, 2)).sum(0)
            if grad_weight is not None:
                grad_weight[piece] = torch.matmul(cast_x.transpose(0, 1), grad_folded)
    for to, value in ((grad_x, sum_x), (grad_y, sum_y)):
        if to is not None and value is not None:
            to.copy_(value)
    if grad_bias is not None:
        grad_bias.copy_(grad.sum((0, 1), dtype=sums))
