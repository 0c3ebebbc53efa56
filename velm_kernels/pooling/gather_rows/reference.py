"""The written meaning of gather_rows, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor


def gather_rows(
    x: Tensor,
    index: Tensor,
    offsets: Tensor | None,
    weight: Tensor | None,
    back_index: Tensor,
    back_offsets: Tensor | None,
    back_weight: Tensor | None,
) -> Tensor:
    """Row m of the result is the sum of ``weight[e] * x[index[e]]`` over ``offsets[m] <= e < offsets[m + 1]``, or of
    entry m alone without offsets; each for itself in a batch. The ``back_`` arguments say the same from the side of
    x; where each row of x goes to one of the result, it is their weights that have a gradient."""
    rows = index.shape[1] if offsets is None else offsets.shape[1] - 1
    if back_offsets is None:
        taken = x if back_weight is None else x * back_weight[..., None]
        # What goes nowhere goes behind the last row.
        row = torch.where(back_index >= 0, back_index, rows).long()
    else:
        # One row more, for what is nothing.
        taken = torch.cat([x, x.new_zeros(x.shape[0], 1, x.shape[2])], 1)
        taken = taken.gather(1, _along(torch.where(index >= 0, index, x.shape[1]).long(), x))
        if weight is not None:
            taken = taken * weight[..., None]
        if offsets is None:
            return taken
        entries = torch.arange(index.shape[1], device=x.device).expand(index.shape).contiguous()
        row = torch.searchsorted(offsets.long(), entries, right=True) - 1
    sums = taken.new_zeros(x.shape[0], rows + 1, x.shape[2]).scatter_add(1, _along(row, x), taken)
    return sums[:, :rows]


def _along(index: Tensor, x: Tensor) -> Tensor:
    """``(batch, entries)`` for all columns of x."""
    return index[..., None].expand(*index.shape, x.shape[2])
