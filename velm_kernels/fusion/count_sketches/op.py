"""The operator count_sketches: the sketches of the rows of two matrices."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from velm_kernels.fusion.count_sketches.reference import count_sketch
from velm_kernels.operator import Operator


def meaning(x: Tensor, index_x: Tensor, sign_x: Tensor, y: Tensor, index_y: Tensor, sign_y: Tensor, dim: int) -> Tensor:
    pairs = ((x, index_x, sign_x), (y, index_y, sign_y))
    return torch.cat([count_sketch(v.to(s.dtype), i.long(), s, dim) for v, i, s in pairs])


def _empty(a: Any) -> Tensor:
    out: Tensor = a.sign_x.new_empty((a.x.shape[0] + a.y.shape[0], a.dim))
    return out


# x, y: (rows, features) of one dtype, last stride 1; index: (features,) int32, values from 0 to dim - 1; sign:
# (features,) float32, both contiguous. The result, the sketches of the rows of x and then those of y, is float32 and
# contiguous.
OPERATOR = Operator(
    "count_sketches",
    "Tensor x, Tensor index_x, Tensor sign_x, Tensor y, Tensor index_y, Tensor sign_y, SymInt dim",
    shapes=_empty,
    reference=meaning,
    triton="fusion.count_sketches.triton",
    cuda="fusion.count_sketches.cuda",
)
