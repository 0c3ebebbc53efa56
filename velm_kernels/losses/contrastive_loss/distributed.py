"""contrastive_loss over the pairs of several processes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from velm_kernels.losses.contrastive_loss import tiles
from velm_kernels.losses.contrastive_loss.op import INVERSE_NORM, STATISTICS
from velm_kernels.losses.contrastive_loss.tiles import SUMS, Targets
from velm_kernels.losses.products import Accumulator, Scores, gradient_of_rows, unit_rows
from velm_kernels.losses.ring import ELSEWHERE, Ring, kernel

Optional = Tensor | None
# Labels of all images and of all texts.
Labels = tuple[Tensor, Tensor] | None


def _targets(ring: Ring, labels: Labels) -> tuple[Targets, Targets]:
    """Of this process's images over all texts, and of its texts over all images."""
    if labels is None:
        return (Targets(None, None, None, None),) * 2
    own = [ring.part(of, side, ring.rank) for side, of in enumerate(labels)]
    return Targets(own[0], labels[1], None, None), Targets(own[1], labels[0], None, None)


def _tile_labels(ring: Ring, labels: Labels, rank: int) -> tuple[Optional, Optional]:
    if labels is None:
        return None, None
    return ring.part(labels[0], 0, ring.rank), ring.part(labels[1], 1, rank)


def _over_tiles(ring: Ring, labels: Labels, rank: int, rows: Tensor, columns: Tensor) -> Any:
    """Each tile of this process's images and another's texts, with what its pass is called with."""
    of_images, of_texts = _tile_labels(ring, labels, rank)
    for r, c, tile in Scores(rows, columns):
        diagonal = r.start - c.start if rank == ring.rank else ELSEWHERE
        both = (None, None) if of_images is None or of_texts is None else (of_images[r], of_texts[c])
        yield r, c, tile, (diagonal, *both, None, None)


class ContrastiveLosses(torch.autograd.Function):
    """The losses of this process's images and of its texts, as of the operator."""

    @staticmethod
    def forward(
        ctx: Any,
        image: Tensor,
        text: Tensor,
        scale: Tensor,
        bias: Optional,
        labels: Labels,
        normalize: bool,
        smoothing: float,
        ring: Ring,
    ) -> tuple[Tensor, Tensor]:
        (rows, row_norms), (columns, column_norms) = unit_rows(image, normalize), unit_rows(text, normalize)
        sums = [x.new_zeros((SUMS, len(x)), dtype=torch.float32) for x in (image, text)]
        for of in sums:
            of[0] = -torch.inf
        statistics = kernel("contrastive_statistics", "contrastive_loss", image)

        def visit(rank: int, columns: Tensor, column_sums: Tensor) -> None:
            for r, c, tile, given in _over_tiles(ring, labels, rank, rows, columns):
                statistics(tile, scale, bias, *given, sums[0][:, r], column_sums[:, c])

        _, sums[1] = ring.round([(columns, 0), (sums[1], 1)], visit)
        totals: list[Optional] = [None, None]
        if smoothing:
            for side, (own, others) in enumerate(((rows, columns), (columns, rows))):
                over_all = scale * (own.float() @ ring.summed(others.sum(0, dtype=torch.float32)))
                totals[side] = over_all if bias is None else over_all + ring.total(1 - side) * bias
        losses = [x.new_empty(len(x), dtype=torch.float32) for x in (image, text)]
        kept = [x.new_empty((STATISTICS, len(x)), dtype=torch.float32) for x in (image, text)]
        targets = _targets(ring, labels)
        for side, norms in enumerate((row_norms, column_norms)):
            given = (sums[side], norms, totals[side], ring.total(1 - side), targets[side], smoothing)
            tiles.finish(*given, losses[side], kept[side])
        ctx.save_for_backward(image, text, scale, bias, *kept)
        ctx.others = labels, normalize, smoothing, ring
        return losses[0], losses[1]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_image_loss: Tensor, grad_text_loss: Tensor) -> Any:
        image, text, scale, bias, *kept = ctx.saved_tensors
        labels, normalize, smoothing, ring = ctx.others
        rows, _ = unit_rows(image, normalize, kept[0][INVERSE_NORM])
        columns, _ = unit_rows(text, normalize, kept[1][INVERSE_NORM])
        targets = _targets(ring, labels)
        row_factors, column_factors = (
            tiles.factors(grad, kept[side], ring.total(1 - side), targets[side], smoothing)
            for side, grad in enumerate((grad_image_loss, grad_text_loss))
        )
        gradients = kernel("contrastive_gradients", "contrastive_loss", image)
        grad_image = torch.empty_like(image, memory_format=torch.contiguous_format)
        grad_text = torch.empty_like(text, memory_format=torch.contiguous_format)
        of_rows = Accumulator(rows, grad_image, True)

        def visit(rank: int, columns: Tensor, column_factors: Tensor, total: Tensor) -> None:
            of_columns = Accumulator(columns, total, True, begun=True)
            for r, c, tile, given in _over_tiles(ring, labels, rank, rows, columns):
                gradients(tile, scale, bias, *given, row_factors[:, r], column_factors[:, c])
                of_rows.add(tile, columns[c], r)
                of_columns.add(tile.t(), rows[r], c)

        start = columns.new_zeros(columns.shape, dtype=torch.float32)
        _, _, total = ring.round([(columns, 0), (column_factors, 1), (start, 0)], visit)
        norms = [of[INVERSE_NORM] if normalize else None for of in kept]
        of_images = of_rows.result()
        assert of_images is not None
        grad_scale = gradient_of_rows(of_images, rows, norms[0], scale, grad_image)
        gradient_of_rows(total, columns, norms[1], scale, grad_text)
        grad_bias = None if bias is None else 0 * grad_scale
        return grad_image, grad_text, grad_scale, grad_bias, None, None, None, None
