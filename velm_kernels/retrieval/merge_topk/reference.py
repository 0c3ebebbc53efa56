"""The meaning of merge_topk in plain torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def merge_topk(
    values: Tensor | Sequence[Tensor], indices: Tensor | Sequence[Tensor], k: int, largest: bool = True
) -> tuple[Tensor, Tensor]:
    """Sorted by index, then by value, then what is nothing to the end: each time in a stable way."""
    found, index = torch.cat(list(values), 1), torch.cat(list(indices), 1)
    order = index.sort(dim=1, stable=True).indices
    key = found.detach().gather(1, order)
    order = order.gather(1, key.sort(dim=1, descending=largest, stable=True).indices)
    is_nothing = (index.gather(1, order) < 0).to(torch.uint8)
    order = order.gather(1, is_nothing.sort(dim=1, stable=True).indices)[:, :k]
    found, index = found.gather(1, order), index.gather(1, order)
    worst = -torch.inf if largest else torch.inf
    behind = (0, k - order.shape[1])
    found = found.masked_fill(index < 0, worst)
    return (
        torch.nn.functional.pad(found, behind, value=worst),
        torch.nn.functional.pad(index.clamp(min=-1), behind, value=-1),
    )
