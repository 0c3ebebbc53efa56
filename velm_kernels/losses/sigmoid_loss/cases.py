"""What sigmoid_loss is tried with."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from velm_kernels.cases import Arguments, Case, Draw
from velm_kernels.losses import pairs
from velm_kernels.losses.sigmoid_loss import reference


def _pairs(draw: Draw, pairs: int, dim: int) -> Arguments:
    image = draw(pairs, dim)
    # Pairs that are alike, as a model learns them.
    given = {"logit_scale": 5 + draw().abs(), "logit_bias": draw() - 3}
    return {"image": image, "text": image + draw(pairs, dim), **given}


def _labels(draw: Draw, images: int, texts: int, dim: int) -> Arguments:
    labels = draw.integers(-1, 4, images), draw.integers(-1, 5, texts)
    given = {"logit_scale": 0.3 + 0.1 * draw().abs(), "normalize": False, "labels": labels, "reduction": "none"}
    return {"image": draw(images, dim), "text": draw(texts, dim), **given}


def meaning(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor | None = None,
    normalize: bool = True,
    labels: Any = None,
    reduction: str = "mean",
) -> Tensor:
    matches = None if labels is None else pairs.same_label(*labels)
    losses = reference.sigmoid_loss(image, text, logit_scale, logit_bias, matches, normalize)
    return losses if reduction == "none" else losses.sum() / max(1, len(losses))


CASES = [
    Case(
        "sigmoid_loss",
        "",
        _pairs,
        meaning,
        ("image", "text", "logit_scale", "logit_bias"),
        sizes={"pairs": 6, "dim": 12},
        larger={"pairs": 150, "dim": 40},
        published={"siglip": {"pairs": 4096, "dim": 768}},
        scaled=("image", "text"),
    ),
    Case(
        "sigmoid_loss",
        "labels",
        _labels,
        meaning,
        ("image", "text", "logit_scale"),
        sizes={"images": 6, "texts": 9, "dim": 12},
        larger={"images": 150, "texts": 90, "dim": 40},
        scaled=("image", "text"),
    ),
]
