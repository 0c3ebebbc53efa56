"""What contrastive_loss is tried with."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from velm_kernels.cases import Arguments, Case, Draw
from velm_kernels.losses.contrastive_loss import reference


def _pairs(draw: Draw, pairs: int, dim: int) -> Arguments:
    image = draw(pairs, dim)
    # Pairs that are alike, as a model learns them.
    return {"image": image, "text": image + draw(pairs, dim), "logit_scale": 5 + draw().abs()}


def _smoothed(draw: Draw, pairs: int, dim: int) -> Arguments:
    given = {"logit_bias": draw(), "normalize": False, "label_smoothing": 0.1, "reduction": "none"}
    return {"image": draw(pairs, dim), "text": draw(pairs, dim), "logit_scale": 0.3 + 0.1 * draw().abs(), **given}


def _labels(draw: Draw, images: int, texts: int, dim: int) -> Arguments:
    labels = draw.integers(-1, 4, images), draw.integers(-1, 5, texts)
    given = {"logit_scale": 3 + draw().abs(), "labels": labels, "label_smoothing": 0.2}
    return {"image": draw(images, dim), "text": draw(texts, dim), **given}


def _soft(draw: Draw, images: int, texts: int, dim: int) -> Arguments:
    targets = (draw(images, texts, wide=True).softmax(1), draw(texts, images, wide=True).softmax(1))
    given = {"logit_scale": 5 + draw().abs(), "soft_targets": targets, "label_smoothing": 0.1, "reduction": "sum"}
    return {"image": draw(images, dim), "text": draw(texts, dim), **given}


def meaning(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor | None = None,
    normalize: bool = True,
    labels: Any = None,
    label_smoothing: float = 0.0,
    soft_targets: Any = None,
    reduction: str = "mean",
) -> Tensor:
    targets: Any = (None, None)
    if labels is not None:
        targets = [reference.targets_of(*both).to(image.dtype) for both in (labels, labels[::-1])]
    elif soft_targets is not None:
        targets = [one.to(image.dtype) for one in soft_targets]
    given = (*targets, normalize, label_smoothing)
    losses = reference.contrastive_loss(image, text, logit_scale, logit_bias, *given)
    if reduction == "none":
        return (losses[0] + losses[1]) / 2
    counts = [1, 1]
    if reduction == "mean":
        counts = [len(loss) if one is None else int((one != 0).any(1).sum()) for loss, one in zip(losses, targets)]
    return (losses[0].sum() / max(1, counts[0]) + losses[1].sum() / max(1, counts[1])) / 2


_OF_PAIRS = ("image", "text", "logit_scale")

CASES = [
    Case(
        "contrastive_loss",
        "",
        _pairs,
        meaning,
        _OF_PAIRS,
        sizes={"pairs": 6, "dim": 12},
        larger={"pairs": 150, "dim": 40},
        published={"clip": {"pairs": 4096, "dim": 512}},
        scaled=("image", "text"),
    ),
    Case(
        "contrastive_loss",
        "smoothed",
        _smoothed,
        meaning,
        _OF_PAIRS,
        sizes={"pairs": 6, "dim": 12},
        larger={"pairs": 150, "dim": 40},
        scaled=("image", "text"),
    ),
    Case(
        "contrastive_loss",
        "labels",
        _labels,
        meaning,
        _OF_PAIRS,
        sizes={"images": 6, "texts": 9, "dim": 12},
        larger={"images": 150, "texts": 90, "dim": 40},
        scaled=("image", "text"),
    ),
    Case(
        "contrastive_loss",
        "soft_targets",
        _soft,
        meaning,
        _OF_PAIRS,
        sizes={"images": 6, "texts": 9, "dim": 12},
        larger={"images": 150, "texts": 90, "dim": 40},
        scaled=("image", "text"),
    ),
]
