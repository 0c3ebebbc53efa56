"""The written meaning of match_rows, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor


def match_rows(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """For each row of ``a`` ``(batch, rows, dim)`` the largest cosine of its angle to a row of ``b``, and the first row
    of ``b`` that has it. The angle to a row of zeros has cosine 0; NaN is never the largest."""
    similarity = _unit(a) @ _unit(b).transpose(1, 2)
    similarity = torch.where(similarity.isnan(), -torch.inf, similarity)
    if b.shape[1] == 0:
        largest = similarity.new_full(similarity.shape[:2], -torch.inf)
        return largest, torch.zeros_like(largest, dtype=torch.int32)
    largest = similarity.amax(2)
    return largest, (similarity == largest[..., None]).to(torch.uint8).argmax(2)


def _unit(rows: Tensor) -> Tensor:
    norms = rows.square().sum(2, keepdim=True).sqrt()
    return torch.where(norms == 0.0, 0.0, rows / norms)
