"""Hard negatives for image-text matching, drawn without the matrix of all scores."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from velm_kernels import checks
from velm_kernels.losses import pairs
from velm_kernels.losses.products import Scores, unit_rows


@torch.no_grad()
def sample_hard_negatives(
    image: Tensor,
    text: Tensor,
    logit_scale: float | Tensor,
    labels: Tensor | tuple[Tensor, Tensor] | None = None,
    generator: torch.Generator | None = None,
    *,
    normalize: bool = True,
) -> tuple[Tensor, Tensor]:
    """For every image a text that does not belong to it, and for every text such an image, drawn with the probability
    of a softmax over those: the negatives of image-text matching in ALBEF (Li et al., 2021, section 3.2) and BLIP.

    The largest of scores to each of which a Gumbel variable was added is a draw from their softmax (Gumbel, 1954;
    Maddison et al., 2014). It is taken tile by tile, so that memory does not grow with images x texts and nobody waits
    for a device.

    Args:
        image: ``(images, d)``, float32, bfloat16, float16 or float64. Not differentiated.
        text: ``(texts, d)``, dtype of image.
        logit_scale: the factor of the scores ``image @ text^T``, a number or a tensor of one element.
        labels: integers ``(n,)``, of pairs: those with the same label belong together and are not drawn for one
            another. Or ``(labels of images, labels of texts)``. A negative label belongs to nothing. None: image i
            belongs to text i.
        generator: for the random numbers, on the device of image; torch's own without it.
        normalize: divide the rows of image and text by their norms.

    Returns:
        ``(texts for images (images,), images for texts (texts,))``, int64 indices; -1 where everything belongs.

    Raises:
        TypeError: an argument has a wrong type or dtype.
        ValueError: shapes or devices do not fit together, or there are different numbers of images and texts without
            labels of both.

    Example:
        >>> image, text = torch.randn(2, 16), torch.randn(2, 16)
        >>> velm_kernels.sample_hard_negatives(image, text, 14.3)  # each has but one
        (tensor([1, 0]), tensor([1, 0]))
    """
    image, text = pairs.rows(image, text)
    of_rows = pairs.labels(labels, image, (image.shape[0], text.shape[0]))
    if of_rows[0] is None:
        pairs.as_many(image, text)
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator: expected a torch.Generator or None, given {checks.describe(generator)}")
    checks.flag("normalize", normalize)
    scale = pairs.factor("logit_scale", logit_scale, image)
    if image.dtype is torch.float64:
        image, text = image.float(), text.float()
    (rows, _), (columns, _) = unit_rows(image, normalize), unit_rows(text, normalize)
    best = [image.new_full((len(x),), -torch.inf, dtype=torch.float32) for x in (image, text)]
    found = [torch.full((len(x),), -1, dtype=torch.int64, device=image.device) for x in (image, text)]
    for r, c, tile in Scores(rows, columns):
        scores = tile.float() * scale.float()
        scores.masked_fill_(_belong(of_rows, r, c, scores), -torch.inf)
        for side, (which, first, dim) in enumerate(((r, c.start, 1), (c, r.start, 0))):
            # A Gumbel variable is minus the logarithm of an exponential one.
            noise = torch.empty_like(scores).exponential_(generator=generator).log_()
            value, index = (scores - noise).max(dim)
            is_better = value > best[side][which]
            best[side][which] = torch.where(is_better, value, best[side][which])
            found[side][which] = torch.where(is_better, index + first, found[side][which])
    return found[0], found[1]


def _belong(labels: Any, rows: slice, columns: slice, scores: Tensor) -> Tensor:
    if labels[0] is not None:
        return pairs.same_label(labels[0][rows], labels[1][columns])
    row, column = (torch.arange(which.start, which.stop, device=scores.device) for which in (rows, columns))
    return row[:, None] == column[None, :]
