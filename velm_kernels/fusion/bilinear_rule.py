"""Where torch's own bilinear form is the faster one on the CPU: small ones, of few outputs, of few rows.

Like the rule of :mod:`velm_kernels.linear.rule` a fixed function of the processor and the sizes, and switched by the
same :func:`velm_kernels.linear.rule.use_product`. Only float32: in half precision torch rounds what is summed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from velm_kernels.backends import forced
from velm_kernels.linear import rule

# Multiplications below which, with up to FEW_OUTPUTS outputs, a call of the operator costs more than the gradients of
# torch's form, which it computes output by output.
SMALL, FEW_OUTPUTS = 1 << 18, 4
# Outputs and rows up to which a call of the operator costs more than torch's forward.
OUTPUTS, ROWS = 16, 256
# The weight of an output is larger than a first-level cache from here on. Torch reads it as it lies, this library in
# tiles, which pays with more rows.
LARGE, LARGE_ROWS = 1 << 16, 8


def torchs_forward(rows: int, weight: Tensor) -> bool:
    """Whether torch's forward is the faster one for float32 rows of x and y with this weight."""
    product = rule.forced_product()
    if product is not None:
        return product == "torch"
    _, dx, dy = weight.shape
    return weight.dtype == torch.float32 and dx * dy >= LARGE and 0 < rows <= LARGE_ROWS


def is_plain_torch(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether a call is best left to ``torch.nn.functional.bilinear`` altogether, which saves the detour.

    Under torch.compile, and for a counter of operations, the operator stays. Arguments that do not fit together are
    left to the checks.
    """
    if weight.dtype != torch.float32 or not weight.is_cpu or rule.forced_product() is not None or forced():
        return False
    shape, other = x.shape, y.shape
    if len(shape) < 2 or shape[:-1] != other[:-1] or weight.shape[1:] != (shape[-1], other[-1]):
        return False
    if not (x.is_cpu and y.is_cpu and x.dtype == y.dtype == torch.float32):
        return False
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0:
        return False
    if bias is not None and (bias.shape != weight.shape[:1] or bias.dtype != torch.float32 or not bias.is_cpu):
        return False
    rows, numbers = x.numel() // max(1, shape[-1]), weight.numel()
    if rows * numbers == 0:
        return False
    out = weight.shape[0]
    if torch.is_grad_enabled() and (
        x.requires_grad or y.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    ):
        return out <= FEW_OUTPUTS and (rows == 1 or rows * numbers <= SMALL)
    return out <= FEW_OUTPUTS or (out <= OUTPUTS and rows < ROWS) or torchs_forward(rows, weight)
