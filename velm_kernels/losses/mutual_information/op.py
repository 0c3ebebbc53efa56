"""The operator mutual_information: of each pair its score, and what its x scores with all other y."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# Its passes over tiles are those of contrastive_loss, where they are declared.
import velm_kernels.losses.contrastive_loss.op  # noqa: F401
from velm_kernels.losses.mutual_information.reference import sums
from velm_kernels.operator import Operator


def _shapes(a: Any) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(a.x.dtype, torch.float32)
    count = a.x.shape[:1]
    return a.x.new_empty(count, dtype=dtype), a.x.new_empty(count, dtype=dtype)


def _products(a: Any) -> int:
    return int(2 * a.x[0] * a.x[1] * a.y[0])


def _backward_products(a: Any) -> int:
    of_x, of_y, of_scale = (bool(a.wanted >> bit & 1) for bit in range(3))
    # The scores again; the gradient of the scale is a sum over that of one side.
    return _products(a) * (1 + (of_x or (of_scale and not of_y)) + of_y)


# x, y (pairs, d), any row stride, last stride 1, one dtype; scale () float32; clip of the scores of what is no pair,
# inf for none. positive and others (pairs,), float32: the score of each pair, and the logarithm of the mean of the
# exponentials of the scores of its x with all other y, of which there is one at least. float64 where x is.
OPERATOR = Operator(
    "mutual_information",
    "Tensor x, Tensor y, Tensor scale, float clip",
    shapes=_shapes,
    reference=sums,
    results=("positive", "others"),
    differentiable=("x", "y", "scale"),
    saves=("x", "y", "scale", "others"),
    triton="losses.mutual_information.triton",
    cpu="losses.mutual_information.cpu",
    cuda=False,
    flops=_products,
    backward_flops=_backward_products,
)
