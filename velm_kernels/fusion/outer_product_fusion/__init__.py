"""The outer product of two modalities, or its sum over regions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from velm_kernels import checks, processors
from velm_kernels.backends import derivatives
from velm_kernels.backends.small import ANY, takes_torch
from velm_kernels.processors import NEVER

# Elements of the result up to which autograd's own gradient, which forms products of that size, is the faster one.
SMALL = 1 << 18


def outer_product_fusion(x: Tensor, y: Tensor, *, lengths: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
    """The outer product ``x y^T`` of each pair of rows, or its sum over regions: bilinear pooling (Lin et al., 2015).

    Args:
        x: ``(batch, dx)`` or ``(batch, regions, dx)``, float32, bfloat16, float16 or float64.
        y: ``(batch, dy)`` or ``(batch, regions, dy)``, with as many regions as x; dtype of x.
        lengths: ``(batch,)``, integers from 0 to regions: the number of leading regions that count.
        mask: bool, broadcastable to ``(batch, regions)``; regions where it is False do not count. They may hold NaN and
            get gradient 0.

    Under autocast x and y are cast to its dtype.

    Returns:
        ``(batch, dx, dy)`` in x's dtype, contiguous; summed in float32 (float64 for float64). 0 for an entry without
        regions that count.

    Raises:
        TypeError: an argument has a wrong type or dtype.
        ValueError: shapes or devices do not fit together, or (on the CPU, or with VELM_CHECK=1) a length does not.

    This is torch's batched matrix product, forward and backward, and has no kernel of its own. The sum over regions is
    a product of matrices, whose limit is that of ``torch.bmm``, and the product of a single region is never formed;
    without regions the time is that of writing the result. On the CPU bfloat16 and float16 are summed, gradients
    too, in float32 and rounded once; on a GPU torch accumulates them in float32, as
    ``torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction`` and its like allow. Backward keeps x and y.

    Example:
        >>> x, y = torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 0.0, 3.0]])
        >>> velm_kernels.outer_product_fusion(x, y)
        tensor([[[1., 0., 3.],
                 [2., 0., 6.]]])
    """
    if isinstance(x, Tensor):
        x, y = checks.autocast(x, y)
    _check(x, y)
    if x.dim() == 2:
        if lengths is not None or mask is not None:
            name, value = ("mask", mask) if lengths is None else ("lengths", lengths)
            raise ValueError(f"{name}: expected None for x without regions, given {checks.describe(value)}")
        recorded = torch.is_grad_enabled() and (x.requires_grad or y.requires_grad)
        if not recorded or (takes_torch(NEVER, x, y, dtype=ANY) and x.numel() * y.shape[1] <= SMALL):
            return x[:, :, None] * y[:, None, :]
        with checks.without_autocast(x.device):
            if derivatives.in_functorch() is not None or derivatives.has_tangent((x, y)):
                return x[:, :, None] * y[:, None, :]
            out: Tensor = _Outer.apply(x, y)
            return out
    live = _live(x, lengths, mask)
    if live is not None:
        x, y = (torch.where(live, value, 0.0) for value in (x, y))
    with checks.without_autocast(x.device):
        return torch.bmm(_factor(x).transpose(1, 2), _factor(y)).to(x.dtype)


def _factor(x: Tensor) -> Tensor:
    """A factor of a product: on the CPU float32 in place of half precision, but for bfloat16 on processors with
    products of their own for it, which sum in float32 too."""
    if x.device.type != "cpu" or x.dtype not in (torch.bfloat16, torch.float16):
        return x
    return x if x.dtype is torch.bfloat16 and not processors.rules().bfloat16_products else x.float()


class _Outer(torch.autograd.Function):
    """``x y^T`` of rows. Autograd's own gradient would form the product of the gradient with x and with y."""

    @staticmethod
    def forward(x: Tensor, y: Tensor) -> Tensor:
        return x[:, :, None] * y[:, None, :]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, y = ctx.saved_tensors
        wants_x, wants_y = ctx.needs_input_grad
        with checks.without_autocast(grad.device):
            g = _factor(grad)
            grad_x = torch.bmm(g, _factor(y)[:, :, None])[..., 0].to(x.dtype) if wants_x else None
            grad_y = torch.bmm(_factor(x)[:, None, :], g)[:, 0].to(y.dtype) if wants_y else None
        return grad_x, grad_y


def _check(x: Tensor, y: Tensor) -> None:
    checks.dtype_in("x", checks.tensor("x", x), checks.FLOAT_DTYPES)
    checks.dtype_in("y", checks.tensor("y", y), (x.dtype,))
    checks.same_device("y", y, "x", x)
    if x.dim() not in (2, 3):
        raise ValueError(f"x: expected (batch, dx) or (batch, regions, dx), given {tuple(x.shape)}")
    if y.dim() != x.dim() or y.shape[:-1] != x.shape[:-1]:
        sizes = ", ".join(map(str, x.shape[:-1]))
        raise ValueError(f"y: expected ({sizes}, dy) for x {tuple(x.shape)}, given {tuple(y.shape)}")


def _live(x: Tensor, lengths: Tensor | None, mask: Tensor | None) -> Tensor | None:
    """Bool ``(batch, regions, 1)``: which regions count; None if all do."""
    batch, regions, _ = x.shape
    live = None
    if mask is not None:
        live = checks.mask("mask", mask, "(batch, regions)", (batch, regions), "x", x)
    if lengths is not None:
        lengths = checks.integers("lengths", lengths, "(batch,)", (batch,), "x", x)
        checks.values_between("lengths", lengths, 0, regions)
        within = torch.arange(regions, device=x.device) < lengths[:, None]
        live = within if live is None else live & within
    return None if live is None else live[..., None]
