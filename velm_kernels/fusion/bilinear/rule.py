"""Where plain forms of torch are faster for the bilinear form on the CPU: small ones, of few outputs, of few rows.

Like the rule of :mod:`velm_kernels.products` a fixed function of the sizes, and switched by the same
:func:`velm_kernels.products.use_product`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from velm_kernels import processors, products
from velm_kernels.backends.small import ANY, takes_torch
from velm_kernels.processors import NEVER

# Numbers of the outer products of all rows up to which forming them and one product with the weight is faster: 0.4 to
# 1.1 of the time just below, without a gradient and with one.
OUTER, OUTER_RECORDED = 1 << 18, 3 << 16
# The same where torch's product in bfloat16 is the faster one, from so many outputs on.
OUTER_BFLOAT16, MANY_OUTPUTS = 3 << 21, 32
# Outputs up to which torch's forward, which goes from output to output, is faster.
FEW_OUTPUTS = 4
# The weight of an output is larger than a first-level cache from here on. Torch reads it as it lies, this library in
# tiles, which pays with more rows.
LARGE, LARGE_ROWS = 1 << 16, 8


def torchs_forward(rows: int, weight: Tensor) -> bool:
    """Whether torch's forward is the faster one for float32 rows of x and y with this weight."""
    product = products.forced_product()
    if product is not None:
        return product == "torch"
    out, dx, dy = weight.shape
    if weight.dtype != torch.float32 or rows == 0:
        return False
    return out <= FEW_OUTPUTS or (dx * dy >= LARGE and rows <= LARGE_ROWS)


def plain(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
    """The bilinear form by way of the outer products, where those are small; else None. Arguments that do not fit
    together are left to the checks."""
    if not takes_torch(NEVER, x, y, weight, dtype=ANY) or weight.dim() != 3:
        return None
    if bias is not None and not (takes_torch(NEVER, bias, dtype=x.dtype) and bias.shape == weight.shape[:1]):
        return None
    shape, (*leading, dy) = x.shape, y.shape or (0,)
    if len(shape) < 2 or weight.shape[1:] != (shape[-1], dy):
        return None
    if list(shape[:-1]) != leading:
        # One row of x for all regions.
        if len(shape) != 2 or len(leading) != 2 or leading[0] != shape[0]:
            return None
        x = x.unsqueeze(1)
    most = most_of_outer(weight.shape[0], x, y, weight)
    if not 0 < y.numel() * shape[-1] <= most or weight.shape[0] == 0 or products.forced_product() is not None:
        return None
    return F.linear((x.unsqueeze(-1) * y.unsqueeze(-2)).flatten(-2), weight.flatten(1), bias)


def most_of_outer(out: int, *tensors: Tensor) -> int:
    """Numbers of outer products up to which forming them is faster, for ``out`` outputs and these arguments."""
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return OUTER_RECORDED
    if tensors[0].dtype is torch.bfloat16 and out >= MANY_OUTPUTS and not processors.rules().bfloat16_products:
        return OUTER_BFLOAT16
    return OUTER
