"""The written meaning of weighted_rows, in plain torch."""

from __future__ import annotations

from torch import Tensor


def weighted_rows(x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """``(batch, n, dim)`` of x ``(batch, rows, dim)``, indices and weights ``(n, taps)``: the sum over taps of
    ``weights[n, tap] * x[b, indices[n, tap]]``, of those whose index is not -1."""
    live = indices >= 0
    if x.shape[1] == 0:
        x = x.new_zeros(x.shape[0], 1, x.shape[2]) + 0 * x.sum(1, keepdim=True)
    taken = x[:, indices.clamp(min=0).long()].masked_fill(~live[..., None], 0.0)
    return (taken * weights.masked_fill(~live, 0.0)[..., None]).sum(2)
