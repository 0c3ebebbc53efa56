"""The written meaning of count sketches, in plain torch."""

from __future__ import annotations

from torch import Tensor


def count_sketch(x: Tensor, index: Tensor, sign: Tensor, dim: int) -> Tensor:
    """``out[..., j]`` is the sum of ``sign[i] * x[..., i]`` over the i with ``index[i] = j``."""
    return x.new_zeros(*x.shape[:-1], dim).index_add(-1, index, x * sign)
