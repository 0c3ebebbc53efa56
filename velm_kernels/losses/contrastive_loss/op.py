"""The operator contrastive_loss: the cross-entropies of images over texts and of texts over images."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from velm_kernels.backends import cpu
from velm_kernels.losses.contrastive_loss import reference
from velm_kernels.operator import Operator

# Rows of what is kept of each image and of each text: the inverse of its norm, what is taken off its scores before
# their exponentials, the inverse of the sum of these, and how its weight is shared: without labels and targets the
# share of the softmax that is not its own pair's, with labels one over the number of those with its label, else the
# sum of its targets.
INVERSE_NORM, BASE, INVERSE_SUM, SHARE = range(4)
STATISTICS = 4


def meaning(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor | None,
    image_labels: Tensor | None,
    text_labels: Tensor | None,
    image_targets: Tensor | None,
    text_targets: Tensor | None,
    normalize: bool,
    label_smoothing: float,
) -> tuple[Tensor, ...]:
    if image_labels is not None and text_labels is not None:
        image_targets = reference.targets_of(image_labels, text_labels).to(image.dtype)
        text_targets = reference.targets_of(text_labels, image_labels).to(image.dtype)
    losses = reference.contrastive_loss(
        image, text, logit_scale, logit_bias, image_targets, text_targets, normalize, label_smoothing
    )
    # The reference's own backward reads none of these.
    return *losses, *(rows.new_zeros(STATISTICS, rows.shape[0]) for rows in (image, text))


def _shapes(a: Any) -> tuple[Tensor, ...]:
    dtype = torch.promote_types(a.image.dtype, torch.float32)
    sizes = (a.image.shape[0], a.text.shape[0])
    return (
        *(a.image.new_empty((size,), dtype=dtype) for size in sizes),
        *(a.image.new_empty((STATISTICS, size), dtype=dtype) for size in sizes),
    )


def _products(a: Any) -> int:
    return int(2 * a.image[0] * a.image[1] * a.text[0])


def _backward_products(a: Any) -> int:
    of_image, of_text, of_scale = (bool(a.wanted >> bit & 1) for bit in range(3))
    # The scores again; the gradient of the scale is a sum over that of one side.
    return _products(a) * (1 + (of_image or (of_scale and not of_text)) + of_text)


# image (images, d), text (texts, d), any row stride, last stride 1, one dtype; logit_scale, logit_bias () float32;
# labels int32 from 0, of both or neither, below 0 for none; targets (images, texts) and (texts, images), any strides,
# float32; float64 where image is. Losses and statistics are float32.
OPERATOR = Operator(
    "contrastive_loss",
    "Tensor image, Tensor text, Tensor logit_scale, Tensor? logit_bias, Tensor? image_labels, Tensor? text_labels, "
    "Tensor? image_targets, Tensor? text_targets, bool normalize, float label_smoothing",
    shapes=_shapes,
    reference=meaning,
    results=("image_loss", "text_loss", "image_statistics", "text_statistics"),
    without_gradient=("image_statistics", "text_statistics"),
    differentiable=("image", "text", "logit_scale", "logit_bias"),
    saves=(
        "image",
        "text",
        "logit_scale",
        "logit_bias",
        "image_labels",
        "text_labels",
        "image_targets",
        "text_targets",
        "image_statistics",
        "text_statistics",
    ),
    triton="losses.contrastive_loss.triton",
    cpu="losses.contrastive_loss.cpu",
    cuda=False,
    flops=_products,
    backward_flops=_backward_products,
)
# One pass over a tile (rows, columns) of products: what its rows and columns sum to, float32 (3, rows) and (3, columns)
# of any row stride, or its gradient in its place, from factors (4, rows) and (4, columns). The pair of row i is column
# i + diagonal.
_TILE = (
    "Tensor(a!) tile, Tensor scale, Tensor? bias, int diagonal, Tensor? row_labels, Tensor? column_labels, "
    "Tensor? row_targets, Tensor? column_targets"
)
cpu.declare(f"contrastive_statistics({_TILE}, Tensor(b!) row_sums, Tensor(c!) column_sums) -> ()")
cpu.declare(f"contrastive_gradients({_TILE}, Tensor row_factors, Tensor column_factors) -> ()")
