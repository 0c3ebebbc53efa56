"""contrastive_loss by tiles of scores: products by torch, and between them one pass over each tile by a kernel."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from velm_kernels.losses import pairs
from velm_kernels.losses.contrastive_loss.op import BASE, INVERSE_NORM, INVERSE_SUM, SHARE
from velm_kernels.losses.products import Accumulator, Scores, gradient_of_rows, unit_rows

Optional = Tensor | None
# From a tile and what is known of its targets to sums over its rows and columns, or to the gradient in its place.
Pass = Callable[..., None]
# Sums over rows: what is taken off scores, the sum of the exponentials of the rest, and of the scores of targets.
SUMS = 3


@dataclass
class Targets:
    """Which columns each row is to find: its own pair, those with its label, or as weights say."""

    row_labels: Optional
    column_labels: Optional
    row_targets: Optional
    column_targets: Optional

    def of_tile(self, rows: slice, columns: slice) -> tuple[Optional, Optional, Optional, Optional]:
        """Both of the targets as (rows, columns), contiguous."""
        if self.row_labels is not None and self.column_labels is not None:
            return self.row_labels[rows], self.column_labels[columns], None, None
        if self.row_targets is not None and self.column_targets is not None:
            of_columns = self.column_targets[columns, rows].t()
            return None, None, self.row_targets[rows, columns].contiguous(), of_columns.contiguous()
        return None, None, None, None

    @property
    def turned(self) -> Targets:
        return Targets(self.column_labels, self.row_labels, self.column_targets, self.row_targets)

    def has_target(self, counts: Optional) -> Any:
        """1 for rows with a target and 0 for others."""
        if counts is not None:
            return (counts > 0).float()
        return 1.0 if self.row_targets is None else (self.row_targets != 0).any(1).float()

    def counts(self) -> Optional:
        """How many targets each row has, by labels."""
        if self.row_labels is None or self.column_labels is None:
            return None
        return pairs.partners(self.row_labels, self.column_labels)


def forward(
    statistics: Pass,
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    bias: Optional,
    image_labels: Optional,
    text_labels: Optional,
    image_targets: Optional,
    text_targets: Optional,
    normalize: bool,
    smoothing: float,
    *made: Tensor,
) -> None:
    targets = Targets(image_labels, text_labels, image_targets, text_targets)
    if image.shape[0] == 0 or text.shape[0] == 0:
        for one in made:
            one.zero_()
        return
    (rows, row_norms), (columns, column_norms) = unit_rows(image, normalize), unit_rows(text, normalize)
    sums = [image.new_zeros((SUMS, len(x)), dtype=torch.float32) for x in (image, text)]
    for of in sums:
        of[0] = -torch.inf
    for r, c, tile in Scores(rows, columns):
        statistics(tile, scale, bias, r.start - c.start, *targets.of_tile(r, c), sums[0][:, r], sums[1][:, c])
    totals: list[Optional] = [None, None]
    if smoothing:
        totals = [_sums_of_scores(*both, scale, bias) for both in ((rows, columns), (columns, rows))]
    of_rows = (sums[0], row_norms, totals[0], len(text), targets)
    of_columns = (sums[1], column_norms, totals[1], len(image), targets.turned)
    for given, loss, kept in zip((of_rows, of_columns), made[:2], made[2:], strict=True):
        finish(*given, smoothing, loss, kept)


def _sums_of_scores(rows: Tensor, columns: Tensor, scale: Tensor, bias: Optional) -> Tensor:
    total = scale * (rows.float() @ columns.sum(0, dtype=torch.float32))
    return total if bias is None else total + len(columns) * bias


def finish(
    sums: Tensor,
    inverse_norms: Tensor,
    total: Optional,
    columns: int,
    targets: Targets,
    smoothing: float,
    loss: Tensor,
    kept: Tensor,
) -> None:
    """Losses of rows and what backward keeps of them from sums over all of their columns."""
    base, exponentials, positive = sums
    counts = targets.counts()
    if counts is None and targets.row_targets is None:
        # The pair itself is not among the exponentials.
        top = torch.maximum(base, positive)
        others, own = exponentials * (base - top).exp(), (positive - top).exp()
        exponentials = others + own
        share = others / exponentials
        found = torch.where(positive >= top, others.log1p(), exponentials.log() + (top - positive))
        base = top
    elif counts is not None:
        share = torch.where(counts > 0, counts.clamp(min=1).reciprocal(), 0.0)
        found = torch.where(counts > 0, exponentials.log() + (base - positive * share), 0.0)
    else:
        assert targets.row_targets is not None
        share = targets.row_targets.sum(1)
        found = share * (exponentials.log() + base) - positive
    if total is not None:
        over_all = exponentials.log() + (base - total / columns)
        found = (1 - smoothing) * found + smoothing * targets.has_target(counts) * over_all
    # Infinite scores leave no number, as differences of infinities.
    torch.add(found, exponentials - exponentials, out=loss)
    kept[INVERSE_NORM], kept[BASE], kept[INVERSE_SUM], kept[SHARE] = (
        inverse_norms,
        base,
        exponentials.reciprocal(),
        share,
    )


def backward(
    gradients: Pass,
    grad_image_loss: Tensor,
    grad_text_loss: Tensor,
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    bias: Optional,
    image_labels: Optional,
    text_labels: Optional,
    image_targets: Optional,
    text_targets: Optional,
    image_statistics: Tensor,
    text_statistics: Tensor,
    normalize: bool,
    smoothing: float,
    grad_image: Optional,
    grad_text: Optional,
    grad_scale: Optional,
    grad_bias: Optional,
) -> None:
    targets = Targets(image_labels, text_labels, image_targets, text_targets)
    rows, _ = unit_rows(image, normalize, image_statistics[INVERSE_NORM])
    columns, _ = unit_rows(text, normalize, text_statistics[INVERSE_NORM])
    lift = None
    if rows.dtype is torch.float16:
        # What is left of a gradient in float16 where it is divided by the number of rows may be nothing.
        lift = torch.maximum(grad_image_loss.abs().amax(), grad_text_loss.abs().amax()).clamp(min=1e-30)
        grad_image_loss, grad_text_loss = grad_image_loss / lift, grad_text_loss / lift
    row_factors = factors(grad_image_loss, image_statistics, len(text), targets, smoothing)
    column_factors = factors(grad_text_loss, text_statistics, len(image), targets.turned, smoothing)
    # The gradient of the scale is a sum over that of one of the two, and NaN in it is NaN in that of the bias.
    of_scale = grad_scale is not None or grad_bias is not None
    of_rows = Accumulator(rows, grad_image, grad_image is not None or (of_scale and grad_text is None))
    of_columns = Accumulator(columns, grad_text, grad_text is not None)
    for r, c, tile in Scores(rows, columns):
        given = targets.of_tile(r, c)
        gradients(tile, scale, bias, r.start - c.start, *given, row_factors[:, r], column_factors[:, c])
        of_rows.add(tile, columns[c], r)
        of_columns.add(tile.t(), rows[r], c)
    total = None
    for sums, unit, kept, to in (
        (of_rows, rows, image_statistics, grad_image),
        (of_columns, columns, text_statistics, grad_text),
    ):
        if (found := sums.result()) is not None:
            if lift is not None:
                found *= lift
            total = gradient_of_rows(found, unit, kept[INVERSE_NORM] if normalize else None, scale, to)
    if grad_scale is not None and total is not None:
        grad_scale.copy_(total)
    if grad_bias is not None and total is not None:
        # What softmaxes and targets sum to is the same.
        torch.mul(total, 0.0, out=grad_bias)


def factors(weights: Tensor, kept: Tensor, columns: int, targets: Targets, smoothing: float) -> Tensor:
    """What the gradients of scores are made of, ``(4, rows)``: what is taken off scores before their exponentials, the
    factor of these, what is taken off every gradient, and what of those of targets, or is that of a pair."""
    counts, share = targets.counts(), kept[SHARE]
    has_target = targets.has_target(counts)
    everywhere = weights * has_target * (smoothing / max(1, columns))
    if counts is None and targets.row_targets is None:
        softmax, target = weights, weights * (smoothing * (1 - 1 / max(1, columns)) - share)
    elif counts is not None:
        softmax, target = weights * has_target, (1 - smoothing) * weights * share
    else:
        softmax = weights * ((1 - smoothing) * share + smoothing * has_target)
        target = (1 - smoothing) * weights
    return torch.stack([kept[BASE], softmax * kept[INVERSE_SUM], everywhere, target])
