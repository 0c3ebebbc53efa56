"""mutual_information by tiles of scores: products by torch, and between them the passes of contrastive_loss, which
leave each row's own pair out of its sum and put a number of its own in the place of its gradient."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from velm_kernels.losses.products import Accumulator, Scores, gradient_of_rows, unit_rows

Optional = Tensor | None
Pass = Callable[..., None]
NO_TARGETS = (None, None, None, None)


def forward(
    statistics: Pass, x: Tensor, y: Tensor, scale: Tensor, clip: float, positive: Tensor, others: Tensor
) -> None:
    rows, columns = unit_rows(x, False)[0], unit_rows(y, False)[0]
    # What is taken off scores, the sum of their exponentials, and the score of the pair; those of columns nobody reads.
    sums, of_columns = (x.new_zeros((3, len(of)), dtype=torch.float32) for of in (x, y))
    sums[0] = of_columns[0] = -math.inf
    one = torch.ones_like(scale)
    for r, c, tile in Scores(rows, columns):
        factor = scale
        if clip < math.inf:
            tile, factor = _scores(tile, scale), one
            which, own = _pairs(r, c, tile)
            positive[which] = own
            tile.clamp_(-clip, clip)
        statistics(tile, factor, None, r.start - c.start, *NO_TARGETS, sums[:, r], of_columns[:, c])
    if clip == math.inf:
        positive.copy_(sums[2])
    torch.add(sums[0], sums[1].div_(len(x) - 1).log_(), out=others)


def backward(
    gradients: Pass,
    grad_positive: Tensor,
    grad_others: Tensor,
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    others: Tensor,
    clip: float,
    grad_x: Optional,
    grad_y: Optional,
    grad_scale: Optional,
) -> None:
    rows, columns = unit_rows(x, False)[0], unit_rows(y, False)[0]
    lift = None
    if rows.dtype is torch.float16:
        # What is left of a gradient in float16 where it is divided by the number of pairs may be nothing.
        lift = torch.maximum(grad_positive.abs().amax(), grad_others.abs().amax()).clamp(min=1e-30)
        grad_positive, grad_others = grad_positive / lift, grad_others / lift
    nothing = torch.zeros_like(others)
    row_factors = torch.stack([others, grad_others / (len(x) - 1), nothing, grad_positive])
    # Columns have no sums of their own: exponentials that are 0, times 0.
    column_factors = torch.stack([nothing + math.inf, nothing, nothing, nothing])
    of_x = Accumulator(rows, grad_x, grad_x is not None or (grad_scale is not None and grad_y is None))
    of_y = Accumulator(columns, grad_y, grad_y is not None)
    one = torch.ones_like(scale)
    for r, c, tile in Scores(rows, columns):
        factors = (r.start - c.start, *NO_TARGETS, row_factors[:, r], column_factors[:, c])
        if clip == math.inf:
            gradients(tile, scale, None, *factors)
        else:
            scores = _scores(tile, scale)
            # As torch.clamp has it, NaN too.
            is_clipped = (scores.abs() <= clip).logical_not_()
            gradients(scores.clamp_(-clip, clip), one, None, *factors)
            scores.masked_fill_(is_clipped, 0.0)
            which, own = _pairs(r, c, scores)
            own.copy_(grad_positive[which])
            tile.copy_(scores)
        of_x.add(tile, columns[c], r)
        of_y.add(tile.t(), rows[r], c)
    total = None
    for of, unit, to in ((of_x, rows, grad_x), (of_y, columns, grad_y)):
        if (found := of.result()) is not None:
            if lift is not None:
                found *= lift
            total = gradient_of_rows(found, unit, None, scale, to)
    if grad_scale is not None and total is not None:
        grad_scale.copy_(total)


def _scores(tile: Tensor, scale: Tensor) -> Tensor:
    """Of products, in their place where that is float32: what is clipped to a number may not be rounded to 16 bits."""
    return tile.float().mul_(scale)


def _pairs(rows: slice, columns: slice, tile: Tensor) -> tuple[slice, Tensor]:
    """Which pairs have their scores in a tile, and a view of these."""
    own = tile.diagonal(rows.start - columns.start)
    first = max(rows.start, columns.start)
    return slice(first, first + len(own)), own
