"""Rows of the result as weighted sums of rows of the input, by index: what selects, merges and un-merges tokens."""

from __future__ import annotations

from torch import Tensor

from velm_kernels.layout import unit_last_stride
from velm_kernels.pooling.gather_rows.op import OPERATOR


def gather_rows(
    x: Tensor,
    index: Tensor,
    offsets: Tensor | None,
    weight: Tensor | None,
    back_index: Tensor,
    back_offsets: Tensor | None,
    back_weight: Tensor | None,
) -> Tensor:
    """The operator for rows in any layout, see the comment there. Its callers have checked the arguments."""
    description = (index, offsets, weight, back_index, back_offsets, back_weight)
    contiguous = [None if value is None else value.contiguous() for value in description]
    out: Tensor = OPERATOR(dict(zip(OPERATOR.names, (unit_last_stride(x), *contiguous), strict=True)))
    return out
